"""The validation that was due when a run was stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint


class MissedValidation(lightning.Callback):
    """Validates at the start of a run that resumes between a step and the validation behind it.

    Or inside that validation, which then counts as none. Lightning takes it as done: its metrics
    would be missing, a plateau would count one less, and the best checkpoint might be another one.
    """

    def __init__(self) -> None:
        self._validated = -1

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Note the step, for the checkpoints that follow."""
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The step of the last validation."""
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self._validated = state_dict["validated"]

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Validate if the checkpoint's batch is one behind which that is done, and it was not.

        As Lightning's training loop does it.
        """
        loop = trainer.fit_loop.epoch_loop
        resumed = trainer.ckpt_path is not None and self._validated != trainer.global_step
        if not (resumed and loop.batch_progress.current.ready):
            return
        if not (trainer.enable_validation and loop._should_check_val_fx(None)):  # type: ignore[arg-type]  # noqa: SLF001
            return
        with _epoch_still_open(trainer) as left_out:
            trainer.validating = True
            loop.val_loop.restarting = False
            loop.val_loop.run()
            trainer.training = True
            for callback in trainer.checkpoint_callbacks if left_out else ():
                if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                    callback.on_train_epoch_end(trainer, pl_module)
        # As after the load, so that the loop goes on as from a checkpoint behind a validation.
        loop.val_loop._has_run = False  # noqa: SLF001


@contextmanager
def _epoch_still_open(trainer: lightning.Trainer) -> Iterator[bool]:
    """Let the epoch be the one that is validated; yields whether its end is left out.

    Lightning takes a checkpoint of behind an epoch's last batch for one of the next epoch, and so
    does not come to the end of the one before, where the best checkpoints are written.
    """
    progress = trainer.fit_loop.epoch_progress
    left_out = progress.current.completed == progress.current.ready
    counts = (progress.current, progress.total) if left_out else ()
    for each in counts:
        each.completed -= 1
    try:
        yield left_out
    finally:
        for each in counts:
            each.completed += 1
