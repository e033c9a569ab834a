"""Which checkpoint a run goes on from: the newest one that is what was written.

candidate                       says step    taken              result
s3://b/run/last.ckpt              1,500      damaged, is told   passed over
runs/base/checkpoints/last.ckpt   1,000      whole              goes on from here
s3://b/run/last.previous.ckpt     1,000      not looked at
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model.checkpoint import LAST
from model.hashes import BrokenCheckpointError, check, read_hashes, step_in


class Taken(NamedTuple):
    """A whole checkpoint on this machine."""

    path: Path
    step: int
    where: str
    """Where it was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A checkpoint that was not looked into yet."""

    step: float
    """Its global step, or the largest that it can be; infinite: to be looked into first."""
    order: tuple[float, ...]
    """Of two with the same step the larger one comes first."""
    take: Callable[[], Taken]
    """Checks it, and fetches it if it is elsewhere; raises BrokenCheckpointError."""


class Found(NamedTuple):
    """The checkpoint to go on from, and what is to be said of newer ones."""

    taken: Taken | None
    broken: list[str]

    @property
    def path(self) -> Path | None:
        """Where it is on this machine."""
        return None if self.taken is None else self.taken.path


def newest(candidates: Sequence[Candidate]) -> Found:
    """The newest whole one by its global step; no more are taken than are needed to know it."""
    broken: list[str] = []
    best: Taken | None = None
    for candidate in sorted(candidates, key=lambda c: (c.step, c.order), reverse=True):
        if best is not None and candidate.step <= best.step:
            break
        try:
            taken = candidate.take()
        except (BrokenCheckpointError, FileNotFoundError) as error:
            broken.append(str(error))
            continue
        if best is None or taken.step > best.step:
            best = taken
    return Found(best, broken)


def newest_whole(folder: Path) -> Found:
    """The newest whole checkpoint of a folder; none if the folder is missing."""
    return newest(local_candidates(folder))


def local_candidates(folder: Path) -> list[Candidate]:
    """The checkpoints of a run's folder.

    Of two with the same step last.ckpt comes first, as it is written after all others; then times
    decide, which in a copied folder may be anything.
    """
    return [
        Candidate(
            step=_claimed(path),
            order=(1, path.name == LAST, path.stat().st_mtime),
            take=lambda path=path: _take(path),  # type: ignore[misc]
        )
        for path in folder.glob("[!.]*.ckpt")
    ]


def _claimed(path: Path) -> float:
    """The largest step that a checkpoint can be of."""
    steps = [content.step for content in read_hashes(path)]
    if steps and None not in steps:
        return max(step for step in steps if step is not None)
    try:
        return step_in(path)
    except (BrokenCheckpointError, FileNotFoundError):
        return math.inf  # to be told


def _take(path: Path) -> Taken:
    content = check(path)
    return Taken(path, step_in(path) if content.step is None else content.step, str(path))
