"""model/checkpoint.py: whole or not at all, and no code from a file."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from model.checkpoint import (
    PREVIOUS,
    AtomicCheckpointIO,
    BrokenCheckpointError,
    newest_whole,
)
from sharding.store import atomic_file

FILES = AtomicCheckpointIO(atomic_file)
NAMES = ("last.ckpt", "last.ckpt.xxh128", "last.previous.ckpt", "last.previous.ckpt.xxh128")


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    """Tensors and plain values are what they were; nothing else is left in the folder."""
    path = tmp_path / "new" / "last.ckpt"
    FILES.save_checkpoint({"weights": torch.arange(3), "step": 5}, path)
    FILES.save_checkpoint({"weights": torch.arange(4), "step": 6}, path)
    loaded = FILES.load_checkpoint(path)
    assert loaded["step"] == 6
    assert torch.equal(loaded["weights"], torch.arange(4))
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "last.ckpt",
        "last.ckpt.xxh128",
        "last.previous.ckpt",
        "last.previous.ckpt.xxh128",
    ]
    assert FILES.load_checkpoint(path.with_name(PREVIOUS))["step"] == 5
    FILES.remove_checkpoint(path)
    assert newest_whole(path.parent) == (path.with_name(PREVIOUS), [])


def test_a_full_disk_leaves_the_good_checkpoint_whole(tmp_path: Path) -> None:
    """When the write fails half way the file before it stays, and no temporary file does.

    The limit on a file's size fails a write as a full disk does, at any place, without root.
    """
    path = tmp_path / "last.ckpt"
    FILES.save_checkpoint({"step": 1}, path)
    program = f"""
import resource, signal, sys, torch
from model.checkpoint import AtomicCheckpointIO
from sharding.store import atomic_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    AtomicCheckpointIO(atomic_file).save_checkpoint({{"x": torch.zeros(100_000)}}, {str(path)!r})
except (OSError, RuntimeError):
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 7
    assert FILES.load_checkpoint(path) == {"step": 1}
    assert {p.name for p in tmp_path.iterdir()} <= {*NAMES}
    assert newest_whole(tmp_path) == (path, [])


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """A pickle that would call something is refused, also if the caller asks for everything."""

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(pickle.UnpicklingError):
        FILES.load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "pwned").exists()


def save_until(operation: int, folder: Path) -> int:
    """Save step 3 in a fork that is killed before its n-th file operation; its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a fork beside threads
        child = os.fork()
    if not child:
        operations = itertools.count(1)

        def kill(event: str, arguments: tuple[object, ...]) -> None:
            here = arguments and str(arguments[0]).startswith(str(folder))
            named = event in {"open", "os.rename", "os.link", "os.remove"}
            if named and here and next(operations) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(kill)
            FILES.save_checkpoint({"step": 3, "x": torch.arange(100)}, folder / "last.ckpt")
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_sigkill_at_each_step_of_a_save(tmp_path: Path) -> None:
    """Whatever file operation it dies before, the newest whole one is the old or the new."""
    found = []
    for operation in itertools.count(1):
        folder = tmp_path / str(operation)
        for step in (1, 2):
            FILES.save_checkpoint({"step": step, "x": torch.arange(100)}, folder / "last.ckpt")
        status = save_until(operation, folder)
        newest, broken = newest_whole(folder)
        assert broken == []
        assert newest == folder / "last.ckpt"
        found.append(FILES.load_checkpoint(newest)["step"])
        assert FILES.load_checkpoint(folder / PREVIOUS)["step"] in {1, 2}
        if status == 0:
            break
        FILES.save_checkpoint({"step": 4}, folder / "last.ckpt")  # what was left is in nobody's way
        assert newest_whole(folder) == (folder / "last.ckpt", [])
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert operation > 6


@pytest.mark.parametrize("hashes", [True, False], ids=["with hashes", "from elsewhere"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, hashes: bool) -> None:
    """The one before is taken, and what is wrong with the newest is said."""
    path = tmp_path / "last.ckpt"
    for step in (1, 2):
        FILES.save_checkpoint({"step": step, "x": torch.arange(1000)}, path)
    path.with_name(PREVIOUS).rename(tmp_path / "kept.ckpt")  # it shares no file with the last one
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"cut": data[: len(data) // 2], "flip": data, "empty": bytearray()}[damage]
    path.unlink()
    path.write_bytes(damaged)
    for leftover in tmp_path.glob("*.xxh128") if not hashes else ():
        leftover.unlink()
    newest, broken = newest_whole(tmp_path)
    assert newest == tmp_path / "kept.ckpt"
    (line,) = broken
    assert str(path) in line
    with pytest.raises(BrokenCheckpointError, match=r"last\.ckpt"):
        FILES.load_checkpoint(path)


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    """An empty folder, a missing one, and one with rubbish alone."""
    assert newest_whole(tmp_path) == newest_whole(tmp_path / "none") == (None, [])
    (tmp_path / "last.ckpt").write_bytes(b"rubbish")
    assert newest_whole(tmp_path).path is None
    assert len(newest_whole(tmp_path).broken) == 1
