"""What tells that a run went wrong: a loss that is no number, an accuracy nobody else got."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch

from model.classifier import ImageBatch

_NEVER = 1 << 62
_NAMED = 8  # keys in the error's one line; the report has all


class DivergedError(RuntimeError):
    """Raised when the loss was not finite; names the samples of the first such batch."""


class Seen(NamedTuple):
    """A batch since the last check."""

    epoch: int
    step: int
    loss: torch.Tensor
    numbers: torch.Tensor


class DivergenceGuard(lightning.Callback):
    """Stops all ranks at the same step when a loss was NaN or infinite.

    Each batch's loss is looked at on the device. The result is fetched, over all ranks, every so
    many steps, before a validation, and before a checkpoint is written: so nothing waits for the
    device in between, and no checkpoint is ever replaced by weights that are lost.
    """

    def __init__(
        self,
        *,
        every_n_steps: int,
        keys_of: Callable[[Sequence[int]], list[str]] | None = None,
        report: Path | None = None,
    ) -> None:
        """keys_of: the names of samples. report: where the batch that did it is described."""
        self._every = every_n_steps
        self._keys_of = keys_of or (lambda numbers: [f"number {number}" for number in numbers])
        self._report = report
        self._first = torch.tensor(_NEVER)  # on the device: the first batch with a bad loss
        self._recent: list[Seen] = []
        self._step = 0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Nothing was seen yet."""
        self._first = torch.tensor(_NEVER, device=pl_module.device)
        self._recent = []

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note which optimizer step the batch is of."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
    ) -> None:
        """Look at the loss without waiting for it."""
        loss = outputs["loss"].detach()
        place = torch.where(torch.isfinite(loss), _NEVER, len(self._recent))
        self._first = torch.minimum(self._first, place)
        self._recent.append(Seen(trainer.current_epoch, self._step, loss, batch.numbers))
        if trainer.global_step > self._step and trainer.global_step % self._every == 0:
            self._check(trainer)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Validating what is lost takes long."""
        self._check(trainer)

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """The checkpoint before is the last good one; it stays."""
        self._check(trainer)

    def _check(self, trainer: lightning.Trainer) -> None:
        """Raise DivergedError, on all ranks, if a loss of any of them was not finite."""
        if not self._recent:
            return
        first = self._first.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        if int(first) == _NEVER:
            self._recent = []
            return
        seen = self._recent[int(first)]
        mine = {"rank": trainer.global_rank, "loss": str(float(seen.loss)), "keys": list[str]()}
        if not torch.isfinite(seen.loss):
            mine["keys"] = self._keys_of(seen.numbers.tolist())
        ranks = [mine]
        if torch.distributed.is_initialized():
            ranks = [{}] * trainer.world_size
            torch.distributed.all_gather_object(ranks, mine)
        bad = [rank for rank in ranks if rank["keys"]]
        report = {"epoch": seen.epoch, "step": seen.step, "ranks": bad}
        if self._report is not None and trainer.is_global_zero:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            self._report.write_text(json.dumps(report, indent=1) + "\n")
        raise DivergedError(_message(report, self._report))


def _message(report: Mapping[str, Any], path: Path | None) -> str:
    keys = [key for rank in report["ranks"] for key in rank["keys"]]
    more = f", ... ({len(keys)} samples)" if len(keys) > _NAMED else ""
    return (
        f"the loss was {report['ranks'][0]['loss']} in epoch {report['epoch']}, step "
        f"{report['step']}; the last checkpoint is of before. Lower the learning rate, clip "
        f"gradients, or look at the batch: {', '.join(keys[:_NAMED])}{more}"
        + (f"; all in {path}" if more and path is not None else "")
    )


@dataclass(frozen=True, kw_only=True)
class ExpectedConfig:
    """The top-1 accuracies, in 0..1, that others got with the recipe; null: not known."""

    accuracy_min: float | None = None
    accuracy_max: float | None = None

    def __post_init__(self) -> None:
        low, high = self._band
        if not 0 <= low <= min(high, 1) or (self.accuracy_max is not None and high > 1):
            raise ValueError(
                "accuracy_min and accuracy_max must be in 0..1 and in order, got "
                f"{self.accuracy_min} and {self.accuracy_max}"
            )

    @property
    def _band(self) -> tuple[float, float]:
        low = 0.0 if self.accuracy_min is None else self.accuracy_min
        return low, math.inf if self.accuracy_max is None else self.accuracy_max

    def complaint(self, metrics: Mapping[str, Any]) -> str | None:
        """What is to be said of a run's last metrics: None if all is well or nothing is known.

        The better one of the weights and their moving average counts.
        """
        found = [float(metrics[f"{m}/acc1"]) for m in ("val", "val_ema") if f"{m}/acc1" in metrics]
        low, high = self._band
        if not found or low <= max(found) <= high:
            return None
        return (
            f"top-1 accuracy {max(found):.4f} is {'below' if max(found) < low else 'above'} what "
            f"the recipe gave others, {low:.4f} to {min(high, 1):.4f}"
        )
