"""model/newest.py: the newest whole checkpoint, and what is said of broken ones."""

import math
import os
from pathlib import Path

import pytest

from model.checkpoint import LAST, PREVIOUS, AtomicCheckpointIO
from model.hashes import BrokenCheckpointError, hashes_path, to_bytes
from model.newest import Candidate, Taken, local_candidates, newest, newest_whole
from sharding.store import atomic_file

FILES = AtomicCheckpointIO(atomic_file)


def candidates(*facts: tuple[float, int | None], taken: list[int]) -> list[Candidate]:
    """(step that is claimed, the true one or None where it is broken), named by their place."""

    def take(number: int, step: int | None) -> Taken:
        taken.append(number)
        if step is None:
            raise BrokenCheckpointError(f"{number} was damaged")
        return Taken(Path(str(number)), step, str(number))

    return [
        Candidate(step=claimed, order=(-number,), take=lambda n=number, s=step: take(n, s))  # type: ignore[misc]
        for number, (claimed, step) in enumerate(facts)
    ]


@pytest.mark.parametrize(
    ("facts", "taken", "path", "broken"),
    [
        ([(5, 5), (7, 7), (6, 6)], [1], "1", 0),
        ([(7, 7), (7, 7)], [0], "0", 0),  # of two the first in order
        ([(5, 5), (7, None), (6, 6)], [1, 2], "2", 1),
        ([(5, 5), (7, 4)], [1, 0], "0", 0),  # it was killed before the new one got its name
        ([(5, 5), (7, 6)], [1], "1", 0),
        ([(5, 5), (math.inf, None)], [1, 0], "0", 1),  # it cannot be read: told, and passed over
        ([(-1, -1), (3, 3)], [1], "1", 0),  # from elsewhere, without a step
        ([(5, None), (6, None)], [1, 0], None, 2),
        ([], [], None, 0),
    ],
)
def test_no_more_are_taken_than_are_needed(
    facts: list[tuple[float, int | None]], taken: list[int], path: str | None, broken: int
) -> None:
    """The newest by the true step; whatever was newer and broken is told."""
    looked: list[int] = []
    found = newest(candidates(*facts, taken=looked))
    assert looked == taken
    assert found.path == (None if path is None else Path(path))
    assert len(found.broken) == broken


def test_one_that_is_gone_is_passed_over() -> None:
    """Between the listing and the look somebody removed it."""

    def gone() -> Taken:
        raise FileNotFoundError("it is gone")

    there = candidates((1, 1), taken=[])
    found = newest([Candidate(step=2, order=(), take=gone), *there])
    assert found.path == Path("0")
    assert found.broken == ["it is gone"]


def test_steps_decide_not_times(tmp_path: Path) -> None:
    """In a copied folder times are those of the copy; with equal steps last.ckpt is the newest."""
    for step in (4, 6, 8):
        FILES.save_checkpoint({"global_step": step}, tmp_path / LAST)
    FILES.save_checkpoint({"global_step": 7}, tmp_path / "best.ckpt")
    FILES.save_checkpoint({"global_step": 8}, tmp_path / "also.ckpt")
    for age, name in enumerate(["last.ckpt", "also.ckpt", PREVIOUS, "best.ckpt"]):
        os.utime(tmp_path / name, (age, age))
    order = []
    for _ in range(4):
        found = newest_whole(tmp_path)
        assert found.path is not None
        assert found.taken is not None
        order.append((found.path.name, found.taken.step))
        FILES.remove_checkpoint(found.path)
    assert order == [(LAST, 8), ("also.ckpt", 8), ("best.ckpt", 7), (PREVIOUS, 6)]


def test_steps_are_found_without_hashes(tmp_path: Path) -> None:
    """As older versions wrote them, and others: they are read from the checkpoints."""
    FILES.save_checkpoint({"global_step": 4}, tmp_path / LAST)
    FILES.save_checkpoint({"global_step": 9}, tmp_path / "best.ckpt")
    for path in tmp_path.glob("*.xxh128"):
        path.unlink()
    assert newest_whole(tmp_path).path == tmp_path / "best.ckpt"


def test_a_claim_is_not_believed(tmp_path: Path) -> None:
    """A new content that was announced and never came: the file is what it was before."""
    FILES.save_checkpoint({"global_step": 4}, tmp_path / LAST)
    FILES.save_checkpoint({"global_step": 6}, tmp_path / "best.ckpt")
    hashes = hashes_path(tmp_path / LAST)
    hashes.write_bytes(f"{'0' * 32} 77 8\n".encode() + hashes.read_bytes())
    assert max(c.step for c in local_candidates(tmp_path)) == 8
    assert newest_whole(tmp_path).path == tmp_path / "best.ckpt"
    hashes.write_bytes(to_bytes([]))
    assert newest_whole(tmp_path).path == tmp_path / "best.ckpt"
