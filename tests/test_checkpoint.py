"""model/checkpoint.py: whole or not at all, and no code from a file."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import AtomicCheckpointIO
from sharding.store import atomic_file

FILES = AtomicCheckpointIO(atomic_file)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    """Tensors and plain values are what they were; nothing else is left in the folder."""
    path = tmp_path / "new" / "last.ckpt"
    FILES.save_checkpoint({"weights": torch.arange(3), "step": 5}, path)
    FILES.save_checkpoint({"weights": torch.arange(4), "step": 6}, path)
    loaded = FILES.load_checkpoint(path)
    assert loaded["step"] == 6
    assert torch.equal(loaded["weights"], torch.arange(4))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


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
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


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
