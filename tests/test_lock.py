"""The lock of a folder: who holds it, who is told so, and what a dead holder leaves."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sharding.errors import UsageError
from sharding.lock import LOCK_NAME, Part, locked
from sharding.manifest import MANIFEST_NAME

HOLD = """
import signal, sys
from pathlib import Path
from sharding.lock import Part, locked
root, plan, *part = sys.argv[1:]
with locked(Path(root), plan=plan, part=Part(*map(int, part)) if part else None,
            other_plan=lambda: None):
    print("held", flush=True)
    signal.pause()
"""


@contextmanager
def holder(root: Path, plan: str, *part: int) -> Iterator[int]:
    """The process id of another process that holds the folder."""
    line = [sys.executable, "-c", HOLD, str(root), plan, *map(str, part)]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()


def take(root: Path, plan: str, part: Part | None = None) -> list[str]:
    """Take and release the lock; returns what was called."""
    calls: list[str] = []
    with locked(root, plan=plan, part=part, other_plan=lambda: calls.append("other")):
        pass
    return calls


@pytest.mark.parametrize("mine", [None, Part(1, 3), Part(2, 3)])
@pytest.mark.parametrize("theirs", [(), (1, 3)])
def test_who_excludes_whom(tmp_path: Path, mine: Part | None, theirs: tuple[int, ...]) -> None:
    """A whole packer excludes all; a part excludes itself and whole packers, and is named."""
    together = mine is not None and theirs and (mine.i, mine.n) != theirs
    with holder(tmp_path, "p", *theirs) as pid, ExitStack() as stack:
        if not together:
            message = rf"at work on .*: host \S+, process {pid}$"
            stack.enter_context(pytest.raises(UsageError, match=message))
        take(tmp_path, "p", mine)
    take(tmp_path, "p", mine)


def test_a_dead_holders_lock_is_free_and_its_plan_is_known(tmp_path: Path) -> None:
    """After SIGKILL the lock is taken at once; another plan is told of, the same one is not."""
    with holder(tmp_path, "p") as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert take(tmp_path, "p") == []
        assert take(tmp_path, "q") == ["other"]
        assert take(tmp_path, "q") == []


def test_parts_of_another_plan_are_refused(tmp_path: Path) -> None:
    """Parts agree on one plan, that of the first; the mark stays for the next part and for seal."""
    take(tmp_path, "p", Part(0, 2))
    take(tmp_path, "p", Part(1, 2))
    with pytest.raises(UsageError, match="unfinished data set of other images or options"):
        take(tmp_path, "q", Part(1, 2))
    assert take(tmp_path, "p") == []


def test_only_those_who_hold_are_named(tmp_path: Path) -> None:
    """Part 0 is gone, part 1 is at work: a whole packer is told of part 1 alone."""
    take(tmp_path, "p", Part(0, 2))
    with holder(tmp_path, "p", 1, 2) as pid, pytest.raises(UsageError) as caught:
        take(tmp_path, "p")
    assert str(caught.value).count("process") == 1
    assert str(caught.value).endswith(f"process {pid}")


def test_nothing_is_left_of_a_finished_data_set(tmp_path: Path) -> None:
    """Once there is a manifest, marks and locks go; what is finished is never 'another plan'."""
    take(tmp_path, "p", Part(0, 2))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(LOCK_NAME)]
    (tmp_path / MANIFEST_NAME).write_text("{}")
    assert take(tmp_path, "q") == []
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


@pytest.mark.parametrize("note", [b"", b"{", b"[1]", b'{"plan": 1}'])
def test_a_mark_that_says_nothing_is_of_another_plan(tmp_path: Path, note: bytes) -> None:
    """Whatever stands in the mark: shards of an unknown plan are not taken for ours."""
    (tmp_path / LOCK_NAME).write_bytes(note)
    assert take(tmp_path, "p") == ["other"]


@pytest.mark.parametrize(("i", "n"), [(-1, 2), (2, 2), (0, 0)])
def test_parts_that_are_none(i: int, n: int) -> None:
    """A part is one of n, counted from 0."""
    with pytest.raises(ValueError, match=f"part {i}/{n}"):
        Part(i, n)
