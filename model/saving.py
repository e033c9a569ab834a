"""When checkpoints are written."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from model.checkpoint import LAST


class TimedCheckpoint(ModelCheckpoint):
    """Writes a checkpoint when so many minutes are over.

    Lightning's own asks all ranks after each batch whether it is time, which waits for the device,
    and may save between the batches of one optimizer step, where gradients would be lost. This one
    looks at the clock every so many steps, and when the step is done.
    """

    def __init__(self, folder: Path, *, filename: str, minutes: float, every_n_steps: int) -> None:
        super().__init__(
            folder,
            filename=filename,
            train_time_interval=timedelta(minutes=minutes),
            enable_version_counter=False,
        )
        self._every = every_n_steps

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the clock, and write."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self._every == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def checkpoint_callbacks(
    folder: Path,
    *,
    title: str,
    every_n_steps: int,
    every_minutes: float | None,
    look_every_n_steps: int,
    averaged: bool,
) -> list[lightning.Callback]:
    """last.ckpt by steps and by the clock; the best three of the weights, and of their average.

    title: what the best ones' names begin with. averaged: whether there is a moving average.
    """
    last = LAST.removesuffix(".ckpt")
    callbacks: list[lightning.Callback] = [
        ModelCheckpoint(
            folder,
            filename=last,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )
    ]
    callbacks += [
        ModelCheckpoint(
            folder,
            filename=f"{title}-epoch={{epoch}}-{split}_acc1={{{split}/acc1:.4f}}",
            auto_insert_metric_name=False,
            monitor=f"{split}/acc1",
            mode="max",
            save_top_k=3,
            save_last=split == "val",
            enable_version_counter=False,
        )
        for split in (("val", "val_ema") if averaged else ("val",))
    ]
    if every_minutes is not None:
        callbacks.append(
            TimedCheckpoint(
                folder, filename=last, minutes=every_minutes, every_n_steps=look_every_n_steps
            )
        )
    return callbacks
