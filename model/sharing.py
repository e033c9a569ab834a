"""All ranks start from the same checkpoint, whichever node's disk it is on.

node    its disk holds    in a run that resumes
0       nothing           gets step 1,500 from rank 8
1       step 1,500        the newest: its first rank, 8, sends it
2       step 1,000        gets step 1,500 from rank 8
"""

import io
from pathlib import Path
from typing import Any, BinaryIO

import lightning
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import distributed

from model.hashes import BrokenCheckpointError, check, step_in

_PIECE = 64 << 20  # of a checkpoint on its way to another rank


class DisagreementError(RuntimeError):
    """Raised on all ranks when some would resume and others begin anew."""


def among_ranks() -> bool:
    """Whether this process is one of several that are connected."""
    return distributed.is_available() and distributed.is_initialized() and _world() > 1


def agree(trainer: lightning.Trainer, path: Path | None, *, name: Path | None) -> Path | None:
    """What this rank gives to `fit` as its checkpoint, once all know whether there is one.

    path: what it found itself. name: what stands for the checkpoint where only others found one.
    To be called by all ranks; connects them, where they were started from outside (torchrun, srun).
    Those that Lightning starts are on one machine, and see the same; that is checked in `fit`.
    """
    if trainer.world_size == 1:
        return path
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None and not isinstance(environment, LightningEnvironment):
        trainer.strategy.setup_environment()
        path = (path or name) if any(_gather(path is not None)) else None
    trainer.callbacks.append(SameStart(resumes=path is not None))  # type: ignore[attr-defined]
    return path


class SameStart(lightning.Callback):
    """Raises DisagreementError, on all ranks, unless all resume or none does."""

    def __init__(self, *, resumes: bool) -> None:
        self._resumes = resumes

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Ask all, before anything is loaded."""
        answers = _gather(self._resumes) if among_ranks() else []
        if any(answers) and not all(answers):
            with_one = [rank for rank, resumes in enumerate(answers) if resumes]
            raise DisagreementError(
                f"only ranks {', '.join(map(str, with_one))} of {len(answers)} found a checkpoint; "
                "start all with torchrun or srun, or let all see the run's folder"
            )


def shared_stream(path: Path) -> BinaryIO:
    """The bytes of the newest whole checkpoint that a rank has under its path.

    To be called by all ranks. The lowest rank that has it reads it and sends it to all. Raises
    BrokenCheckpointError on all ranks if none has one.
    """
    mine: tuple[int, str]
    try:
        content = check(path)
        mine = (step_in(path) if content.step is None else content.step, "")
    except (BrokenCheckpointError, OSError) as error:
        mine = (-2, str(error))
    answers = _gather(mine)
    newest = max(step for step, _ in answers)
    if newest == -2:
        raise BrokenCheckpointError(answers[0][1])
    source = [step for step, _ in answers].index(newest)
    reader = path.open("rb") if _rank() == source else None
    received = io.BytesIO()
    while piece := _broadcast(reader.read(_PIECE) if reader else b"", source):
        received.write(piece)
    if reader:
        reader.close()
    received.seek(0)
    return received


def _world() -> int:
    return distributed.get_world_size()


def _rank() -> int:
    return distributed.get_rank()


def _gather(value: Any) -> list[Any]:
    answers: list[Any] = [None] * _world()
    distributed.all_gather_object(answers, value)
    return answers


def _broadcast(piece: bytes, source: int) -> bytes:
    box = [piece]
    distributed.broadcast_object_list(box, src=source)
    return box[0]
