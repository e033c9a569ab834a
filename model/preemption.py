"""Preemption: a signal asks, the ranks agree at a step, save together, and end.

A scheduler that wants a node back sends SIGTERM or SIGUSR1, to one process or to all. The handler
only sets a flag. After each step the ranks begin to exchange their flags on the CPU, and look at
the answer a step later, so nobody waits, the device is not asked, and all see the same answer at
the same step. Lightning's own handler, which talks to other ranks inside a signal handler and can
hang, is replaced while training runs.
"""

import os
import signal
from collections.abc import Callable
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

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptedError(Exception):
    """Raised on all ranks at the same step, after the checkpoint was saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"preempted and saved at step {step}; start the same command again")


class Preemption(Checkpoint):
    """Saves and ends training at a step boundary after a signal to any rank.

    A Checkpoint to Lightning, so that it comes after the callbacks that a checkpoint depends on. A
    signal during a validation takes effect after the step that follows it.
    """

    def __init__(self, run: Path) -> None:
        """run: folder in which to save, and to leave the marker."""
        self._checkpoint = run / "checkpoints" / LAST
        self._marker = run / MARKER
        self._asked = self._agreed = False
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._exchange: Callable[[], bool] | None = None
        self._step = -1

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Take the signals over, after Lightning has."""
        self._marker.unlink(missing_ok=True)
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")
        self._step = trainer.global_step
        self._before = {name: signal.signal(name, self._ask) for name in _SIGNALS}

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Agree; raise PreemptedError where all ranks do and an optimizer step was completed."""
        if self._exchange is not None:
            self._agreed = self._agreed or self._exchange()
        self._exchange = self._begin()
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if not (self._agreed and stepped):  # inside an accumulation gradients would be lost
            return
        trainer.save_checkpoint(self._checkpoint)
        if trainer.is_global_zero:
            self._marker.write_text(f"step {trainer.global_step}\n")
        raise PreemptedError(trainer.global_step)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Give the signals back."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

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
