"""Callbacks of our own: the check that validation was exact, and the trace of samples."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lightning
import torch


class NumberedBatch(Protocol):
    """A batch that knows which samples it holds: their numbers in the data set, (N,) int64."""

    numbers: torch.Tensor


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


class EpochSummary(lightning.Callback):
    """Prints one line for each validation, for logs that are no terminal."""

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Epoch, step and metrics, on rank 0."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        names = ("train/loss", "val/loss", "val/acc1", "val/acc5", "val_ema/acc1")
        metrics = trainer.callback_metrics
        values = ", ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)
        print(f"epoch {trainer.current_epoch}, step {trainer.global_step}: {values}", flush=True)


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
        batch: NumberedBatch,
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
