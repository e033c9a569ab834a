"""train.py with faults at stated places: FAULTS='[{...}]' python tests/faulty.py ARGUMENTS.

Each fault: rank, place (train, validation, sanity, save), step, and what to do: a signal to
itself, or to its parent (`agent SIGTERM`), `hang`, or an error of one of several kinds.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning

sys.path.append(str(Path(__file__).parents[1]))  # where train.py is found

import train
from sharding.errors import DataError

ERRORS: dict[str, Exception] = {
    "data": DataError("shard 7 is broken"),
    "disk": OSError(28, "No space left on device"),
    "bug": KeyError("forgotten"),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens where."""

    rank: int
    place: str
    step: int
    do: str
    times: int = 1


class Faults(lightning.Callback):
    """Has them happen."""

    def __init__(self, faults: list[Fault]) -> None:
        self._left = faults

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._at("train", trainer)

    def on_validation_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._at("sanity" if trainer.sanity_checking else "validation", trainer)

    def on_save_checkpoint(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._at("save", trainer)

    def _at(self, place: str, trainer: lightning.Trainer) -> None:
        here = (trainer.global_rank, place, trainer.global_step)
        for fault in [f for f in self._left if (f.rank, f.place, f.step) == here]:
            self._left.remove(fault)
            happen(fault)


def happen(fault: Fault) -> None:
    """Do it."""
    if fault.do == "hang":
        threading.Event().wait()
    if fault.do in ERRORS:
        raise ERRORS[fault.do]
    whom = os.getppid() if fault.do.startswith("agent ") else os.getpid()
    for _ in range(fault.times):
        os.kill(whom, signal.Signals[fault.do.removeprefix("agent ")])


def main(faults: list[Fault], arguments: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    program: Any = train
    original = program.build_trainer

    def build(*args: Any, more: Any, **options: Any) -> lightning.Trainer:
        trainer: lightning.Trainer = original(*args, more=[*more, Faults(list(faults))], **options)
        return trainer

    program.build_trainer = build
    try:
        return train.main(arguments)
    finally:
        program.build_trainer = original


if __name__ == "__main__":
    sys.exit(main([Fault(**fault) for fault in json.loads(os.environ.get("FAULTS", "[]"))]))
