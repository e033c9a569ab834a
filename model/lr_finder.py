"""Finds a learning rate: the loss over an exponential ramp of rates (arXiv:1506.01186)."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed

from model.classifier import Classifier, ImageBatch
from model.seeding import step_seed

_SMOOTHING = 0.9
_LOST = 4.0  # a smoothed loss so many times the least one ends the ramp
_FLAT = 1e-6  # of the loss: less is rounding
_SKIPPED = 5  # the first points, where the smoothed loss is of few batches
_LOSS_SCALE = 1024.0  # keeps half precision's gradients off zero; taken out again in full precision


@dataclass(frozen=True, kw_only=True)
class FinderConfig:
    """The ramp of rates: from lr_min to lr_max in so many optimizer steps."""

    steps: int = 100
    lr_min: float = 1e-5
    lr_max: float = 10.0

    def __post_init__(self) -> None:
        if self.steps < 2 * _SKIPPED:
            raise ValueError(f"steps must be at least {2 * _SKIPPED}, got {self.steps}")
        if not 0 < self.lr_min < self.lr_max < math.inf:
            raise ValueError(
                f"lr_min and lr_max must be positive and in order, got {self.lr_min} and "
                f"{self.lr_max}"
            )

    def rate(self, step: int) -> float:
        """The rate of a step of the ramp."""
        return self.lr_min * math.pow(self.lr_max / self.lr_min, step / (self.steps - 1))


class NoRateError(ValueError):
    """Raised when no rate of the ramp is any good."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The ramp as far as it went, and what it suggests."""

    suggestion: float
    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential moving average, corrected for its beginning at nothing."""
    average, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        found.append(average / (1 - _SMOOTHING**count))
    return found


def suggest(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """The rate at which the smoothed loss falls most steeply over the logarithm of the rate.

    Before the smoothed loss is at its least: behind that it only recovers from having been lost.
    Raises NoRateError if it falls nowhere.
    """
    smoothed = smooth(losses)
    least = int(np.argmin(smoothed))
    if least > _SKIPPED:
        slopes = np.gradient(np.array(smoothed), np.log(rates))[_SKIPPED:least]
        if slopes.min() < -_FLAT * abs(smoothed[0]):
            return Found(
                suggestion=rates[_SKIPPED + int(slopes.argmin())],
                rates=list(rates),
                losses=list(losses),
                smoothed=smoothed,
            )
    raise NoRateError(
        f"no learning rate from {rates[0]:g} to {rates[-1]:g} made the loss fall; set optim.lr, or "
        "another lr_finder.lr_min and lr_max"
    )


class LRFinder(lightning.Callback):
    """Runs the ramp on a copy of the module before training, with all ranks.

    Neither the weights nor torch's generators are touched, and batches come from a loader of its
    own: the run that follows is the one that it would be with the rate in its recipe.
    """

    def __init__(
        self,
        config: FinderConfig,
        *,
        batches: Callable[[], Iterator[ImageBatch]],
        report: Callable[[Found], None],
        seed: int,
        train: bool,
    ) -> None:
        """batches: of this rank, without end. report: called on rank 0. train: afterwards."""
        self._config = config
        self._batches = batches
        self._report = report
        self._seed = seed
        self._train = train

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Find the rate, unless a checkpoint has brought it."""
        module = cast(Classifier, pl_module)
        if not self._train:  # no epoch, not even a sanity check
            trainer.fit_loop.max_epochs = 0
            trainer.num_sanity_val_steps = 0
        elif module.lr_scale is not None:
            return
        with isolate_rng():
            found = self._search(trainer, module)
        module.lr_scale = found.suggestion
        if trainer.is_global_zero:
            self._report(found)

    def _search(self, trainer: lightning.Trainer, original: Classifier) -> Found:
        module = copy.deepcopy(original).train()
        optimizer = module.configure_optimizers()
        batches = self._batches()
        rates: list[float] = []
        losses: list[float] = []
        for step in range(self._config.steps):
            for group in optimizer.param_groups:
                group["lr"] = self._config.rate(step)
            loss = self._step(trainer, module, optimizer, batches, step)
            if not math.isfinite(loss):
                break
            rates.append(self._config.rate(step))
            losses.append(loss)
            smoothed = smooth(losses)
            if smoothed[-1] > _LOST * min(smoothed):
                break
        if not rates:
            raise NoRateError(f"the loss is {loss} before any training; no rate can be found")
        return suggest(rates, losses)

    def _step(
        self,
        trainer: lightning.Trainer,
        module: Classifier,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[ImageBatch],
        step: int,
    ) -> float:
        """One optimizer step of the global batch; its loss, the same on all ranks."""
        optimizer.zero_grad()
        total = torch.zeros((), device=module.device)
        for micro in range(trainer.accumulate_grad_batches):
            batch = trainer.strategy.batch_to_device(next(batches))
            torch.manual_seed(
                step_seed(seed=self._seed, step=step, micro=micro, rank=trainer.global_rank)
            )
            with trainer.precision_plugin.forward_context():
                _, loss = module.answer(batch, module)
            (loss * _LOSS_SCALE).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        parts = trainer.accumulate_grad_batches * trainer.world_size
        weights = list(module.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if trainer.world_size > 1:
            for tensor in (total, *gradients):
                distributed.all_reduce(tensor)
        for gradient in gradients:
            gradient.div_(parts * _LOSS_SCALE)
        if trainer.gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(weights, trainer.gradient_clip_val)
        optimizer.step()
        return float(total) / parts
