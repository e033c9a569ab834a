"""Every rank of a run ends when one is dead, stuck or has failed; one line says which, and why."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning
from torch import distributed
from torch.distributed import distributed_c10d

from model.first_line import first_line
from model.guards import DivergedError
from model.heartbeat import Heartbeat
from model.lr_finder import NoRateError
from model.preemption import PreemptedError
from model.sharing import DisagreementError

# Raised on all ranks, and told by train.py.
_TOGETHER = (PreemptedError, DivergedError, NoRateError, DisagreementError)

_set_timeout: Any = getattr(distributed, "set_timeout", None)  # of torch 2.15
if _set_timeout is None:
    _set_timeout = distributed_c10d._set_pg_timeout  # noqa: SLF001

Outcome = Callable[[BaseException], tuple[int, str] | None]
"""Exit status and line of an exception that a user is meant to see; None for a bug."""


def of_a_collective(error: BaseException) -> bool:
    """Whether another rank, or the way to it, may be the cause."""
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return gloo or isinstance(error, distributed.DistError)


class Liveness(lightning.Callback):
    """Watches over the ranks; does nothing in a run of one process.

    The places that it notes are the same on all ranks, and each comes after the one before, so
    that a rank which is behind is told from those that wait for it.
    """

    def __init__(
        self, *, timeout_s: float, complain: Callable[[str], None], outcome: Outcome
    ) -> None:
        """timeout_s: silence that is too long. complain: writes a line for the user."""
        self.status: int | None = None
        """What this rank has to end with when its error was told; None: raise it."""
        self._timeout_s = timeout_s
        self._complain = complain
        self._outcome = outcome
        self._heart: Heartbeat | None = None
        self._place = (0, 0)

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Begin. All ranks are here together."""
        if trainer.world_size == 1:
            return
        # NCCL's time-out aborts the process; what names the rank has to come before it.
        later_s = 5.0 if distributed.get_backend() == "nccl" else 0.0
        _set_timeout(timedelta(seconds=self._timeout_s + later_s))
        children = getattr(trainer.strategy.launcher, "procs", [])
        for thread in threading.enumerate():
            # Lightning's own kills all processes without a word when one has ended.
            if thread.name == "child-process-observer":
                thread._child_processes = []  # type: ignore[attr-defined]  # noqa: SLF001
        self._heart = Heartbeat(
            # Torch's own, on a connection of ours.
            distributed.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self._timeout_s),
            ),
            rank=trainer.global_rank,
            world=trainer.world_size,
            local_rank=trainer.local_rank,
            timeout_s=self._timeout_s,
            complain=self._complain,
            children=children,
        )
        trainer.strategy.barrier("liveness")  # everyone's first beat is there
        self._heart.start()

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Training begins, or the validation that was missed."""
        self._note(trainer, 1, "waiting for the first batch")

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """There is a batch."""
        self._place = (self._place[0] + 1, 0)
        self._note(trainer, 0, "in a training step")

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Behind it there may be a checkpoint or a validation."""
        self._note(trainer, 1, "waiting for the next batch")

    def on_validation_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """All ranks begin together."""
        self._note(trainer, 2, "validating")

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """The same place: ranks may have different numbers of batches."""
        self._note(trainer, 2, "validating")

    def on_validation_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """This rank is done, and waits for the sums."""
        self._note(trainer, 3, "ending a validation")

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """As behind a batch."""
        self._note(trainer, 4, "waiting for the next batch")

    def on_save_checkpoint(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Rank 0 writes, the others wait: no other place."""
        self._note(trainer, self._place[1], "saving a checkpoint")

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Tell the others what happened here, or hear from them what happened there."""
        if self._heart is None:
            return
        if isinstance(exception, _TOGETHER):
            pass
        elif of_a_collective(exception):
            verdict = self._heart.fail(first_line(exception))
            self.status = None if verdict is None else verdict.status
        else:
            known = self._outcome(exception)
            status, line = known or (1, f"{type(exception).__name__}: {first_line(exception)}")
            verdict = self._heart.propose(status, f"rank {trainer.global_rank}: {line}")
            bug = known is None and verdict.author == trainer.global_rank
            self.status = None if bug else verdict.status
        self._heart.leave()

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """All went well."""
        if self._heart is not None:
            self._heart.leave()

    def _note(self, trainer: lightning.Trainer, stage: int, doing: str) -> None:
        self._place = (self._place[0], stage)
        if self._heart is not None:
            self._heart.note(self._place, doing, trainer.global_step)


def last_word(trainer: lightning.Trainer) -> int | None:
    """The exit status of a rank whose error, or that of another one, was told; else None."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one.status for one in callbacks if isinstance(one, Liveness)), None)
