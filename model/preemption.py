"""Preemption: a signal asks, the ranks agree behind a batch, save together, and end.

A scheduler that wants a node back sends SIGTERM or SIGUSR1, to one process or to all; a terminal
sends SIGINT, to all of this machine's. The handler only sets a flag. After each batch, of training
and of validation, the ranks begin to exchange their flags on the CPU, and look at the answer a
batch later: so nobody waits, the device is not asked, and all see the same answer at the same
place. Lightning's own handler, which talks to other ranks inside a signal handler and can hang, is
out of the way.
"""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from model.checkpoint import LAST

EXIT_PREEMPTED = 75
MARKER = "PREEMPTED"
"""In the run's folder: torchrun makes 1 of a worker's 75, so launchers look for this file."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_HEARD = b"\nsaving behind this step, then ending; Ctrl-C again ends at once\n"


class PreemptedError(Exception):
    """Raised on all ranks at the same place, after the checkpoint was saved."""

    def __init__(self, step: int, *, saved: bool) -> None:
        what = f"preempted and saved at step {step}" if saved else "preempted before the first step"
        super().__init__(f"{what}; the same command with --resume auto goes on")


class Preemption(Checkpoint):
    """Saves and ends training behind the batch that follows a signal to any rank.

    In training that is where an optimizer step is done. In a validation the checkpoint is of the
    state before it, and MissedValidation validates again. Where this run has made no step yet there
    is nothing to save: the checkpoint that it began with, if any, stays.

    A Checkpoint to Lightning, so that it comes after the callbacks that a checkpoint depends on.
    """

    def __init__(self, run: Path, *, timeout_s: float) -> None:
        """run: folder in which to save, and to leave the marker. timeout_s: of the exchange."""
        self._checkpoint = run / "checkpoints" / LAST
        self._marker = run / MARKER
        self._timeout_s = timeout_s
        self._asked = self._agreed = self._speaks = self._ended = False
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._exchange: Callable[[], bool] | None = None
        self._step = 0
        self._trained = False  # since this process began
        self._shared_batches = 0

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Take the signals over, and keep Lightning from it."""
        self._marker.unlink(missing_ok=True)
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]  # noqa: SLF001
        # At each batch this asks rank 0's device whether that handler ran, and hides a dead rank.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]  # noqa: SLF001
        if trainer.world_size > 1:
            limit = timedelta(seconds=self._timeout_s)
            self._group = distributed.new_group(backend="gloo", timeout=limit)
        self._speaks = trainer.is_global_zero
        self._before = {name: signal.signal(name, self._ask) for name in _SIGNALS}

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Note where this run begins."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Raise PreemptedError where all ranks agree and an optimizer step was completed."""
        self._agree()
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        self._trained |= stepped
        if self._agreed and stepped:  # inside an accumulation gradients would be lost
            # What Lightning would do next: a step that is saved is also logged.
            trainer._logger_connector.on_batch_end()  # noqa: SLF001
            trainer._logger_connector.update_train_step_metrics()  # noqa: SLF001
            self._end(trainer, save=True)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Find how many batches all ranks have: behind each of those they agree."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        batches = torch.tensor(int(sum(loop.max_batches)))
        if self._group is not None:
            distributed.all_reduce(batches, distributed.ReduceOp.MIN, group=self._group)
        self._shared_batches = int(batches)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        *number: int,
    ) -> None:
        """Raise PreemptedError where all ranks agree. number: of the batch, and of its loader."""
        if number[0] >= self._shared_batches:
            return
        self._agree()
        if self._agreed:
            self._end(trainer, save=self._trained)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Give the signals back, but not in a process that was asked to end and does so."""
        if not isinstance(exception, PreemptedError):
            self._give_back()

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._ended:
            if self._asked:  # there is no patience for a step, or none comes
                raise KeyboardInterrupt
            if self._speaks:
                os.write(2, _HEARD)  # print may be what was interrupted
        self._asked = True

    def _end(self, trainer: lightning.Trainer, *, save: bool) -> None:
        if save:
            trainer.save_checkpoint(self._checkpoint)
        if trainer.local_rank == 0:  # on each machine: they may not share the folder
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.write_text(f"step {trainer.global_step}\n")
        self._ended = True
        raise PreemptedError(trainer.global_step, saved=save)

    def _agree(self) -> None:
        """Take the answer that was asked for a batch ago, and ask again."""
        if self._exchange is not None:
            self._agreed = self._agreed or self._exchange()
        self._exchange = self._begin()

    def _begin(self) -> Callable[[], bool]:
        """Begin to exchange the flags; the result waits for the answer."""
        if self._group is None:
            return lambda: self._asked
        flag = torch.tensor([int(self._asked)])
        work = distributed.all_reduce(
            flag, distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

        def wait() -> bool:
            work.wait()
            return bool(flag.item())

        return wait


def exit_status(rank: int) -> int:
    """What a preempted process ends with.

    A rank that Lightning started itself ends with 0: its 75 would make Lightning kill rank 0.
    """
    by_lightning = not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys()
    return 0 if rank and by_lightning else EXIT_PREEMPTED


def _nothing() -> None:
    """What is put in the place of Lightning's handling of signals."""
