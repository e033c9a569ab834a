"""Callbacks of our own: validation was exact, lines for logs, how the data came, the samples."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lightning

from model.classifier import ImageBatch

PROGRESS_S = 30.0


class ExactValidation(lightning.Callback):
    """Fails a run in which a validation did not see every sample of the split exactly once."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Compare the images seen, over all ranks, with the manifest's count."""
        # Overfitting to one batch makes limit_val_batches 1, which is not 1.0, but equals it.
        few = trainer.fast_dev_run or trainer.overfit_batches  # type: ignore[attr-defined]
        limited = few or trainer.limit_val_batches != 1.0
        if trainer.sanity_checking or limited:
            return
        seen = int(trainer.callback_metrics["val/seen"])
        if seen != self._samples:
            raise RuntimeError(f"validation saw {seen} images, the split has {self._samples}")


class ProgressLines(lightning.Callback):
    """A line for each validation and, for logs without a progress bar, every so many seconds.

    On rank 0.
    """

    def __init__(
        self, every_s: float = PROGRESS_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_s = every_s
        self._clock = clock
        self._since = 0.0
        self._images = 0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count; a run that goes on inside an epoch has no other beginning."""
        self._begin()

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count."""
        self._begin()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
    ) -> None:
        """How far the epoch is, how fast, when it ends at this speed; the step's loss."""
        self._images += len(batch.labels) * trainer.world_size
        spent = self._clock() - self._since
        # The loss is on the device, and is waited for no more often than a line is written.
        if spent < self._every_s or not trainer.is_global_zero:
            return
        rate, done, batches = self._images / spent, batch_idx + 1, int(trainer.num_training_batches)
        left_s = (batches - done) * len(batch.labels) * trainer.world_size / rate
        print(
            f"epoch {trainer.current_epoch}, {done / batches:.0%} (step {trainer.global_step}): "
            f"{rate:,.0f} images/s, {_duration(left_s)} left of the epoch"
            + _listed(", ", trainer, ("train/loss",)),
            flush=True,
        )
        self._begin()

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Epoch, step and metrics."""
        self._begin()  # validation is no training
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        names = ("train/loss", "val/loss", "val/acc1", "val/acc5", "val_ema/acc1")
        line = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        line += _listed(": ", trainer, names)
        bar = trainer.progress_bar_callback
        if bar is not None:  # above it
            bar.print(line)
        else:
            print(line, flush=True)

    def _begin(self) -> None:
        self._since, self._images = self._clock(), 0


def _listed(separator: str, trainer: lightning.Trainer, names: Sequence[str]) -> str:
    """Those of the metrics that there are."""
    metrics = trainer.callback_metrics
    values = ", ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)
    return values and separator + values


def _duration(seconds: float) -> str:
    """A time for people: '40 s', '12 min', '2.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class MeteredLoader(Protocol):
    """A training loader that counts what it does."""

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, by name."""
        ...


class DataMetrics(lightning.Callback):
    """Logs each epoch how the data came: rates, waiting, cache hits; the mean over ranks."""

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count."""
        self._loader(trainer).metrics()

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Log what was counted."""
        pl_module.log_dict(self._loader(trainer).metrics(), sync_dist=True)

    @staticmethod
    def _loader(trainer: lightning.Trainer) -> MeteredLoader:
        return cast(MeteredLoader, trainer.train_dataloader)


class SampleTrace(lightning.Callback):
    """Writes a JSON line for each training batch: epoch, optimizer step and the samples' keys.

    One file a rank, opened for appending: a resumed run's lines follow those of the run before.
    """

    def __init__(self, folder: Path, keys_of: Callable[[Sequence[int]], list[str]]) -> None:
        self._folder = folder
        self._keys_of = keys_of

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: ImageBatch,
        batch_idx: int,
    ) -> None:
        """Write the line before the step, so that a step that was begun is never missing."""
        line: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "batch": batch_idx,
            "keys": self._keys_of(batch.numbers.tolist()),
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / f"samples-rank{trainer.global_rank}.jsonl", "a") as stream:
            stream.write(json.dumps(line) + "\n")
