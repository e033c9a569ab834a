"""Checkpoints on disk: written whole or not at all, checked when read, loaded without running code.

last.ckpt             the newest
last.ckpt.xxh128      XXH3-128 and size of what may stand in last.ckpt, a line each
last.previous.ckpt    the one before, with its own .xxh128
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

LAST = "last.ckpt"
PREVIOUS = "last.previous.ckpt"

AtomicFile = Callable[[Path], AbstractContextManager[BinaryIO]]
"""Opens a file that appears whole when its block ends well, or not at all."""

_PIECE = 8 << 20


class BrokenCheckpointError(ValueError):
    """Raised for a checkpoint that is not what was written; says how."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint by a whole new one, or leaves it as it was.

    Lightning's own goes through the system's temporary folder; when that is on another file system,
    a full disk destroys the checkpoint that it was about to replace.
    """

    def __init__(self, atomic_file: AtomicFile) -> None:
        self._atomic_file = atomic_file

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint. last.ckpt becomes last.previous.ckpt.

        The file of hashes is written before the checkpoint gets its name, and names both the new
        one and the one that is there: a kill in between leaves a pair that fits, too.
        """
        path = Path(path)
        with self._atomic_file(path) as stream:
            hashing = _Hashing(stream)
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # all that it calls is there
            before = _hashes(path)[:1] if path.exists() else []
            if before and path.name == LAST:
                self._keep(path, before[0])
            self._write_hashes(path, [hashing.line(), *before])

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values only: a checkpoint from elsewhere cannot run code.

        Raises BrokenCheckpointError if the file is not what was written.
        """
        check(Path(path))
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint and its hashes."""
        super().remove_checkpoint(path)
        _hashes_of(Path(path)).unlink(missing_ok=True)

    def _keep(self, path: Path, line: str) -> None:
        """Give the last checkpoint a second name, which stays when the first one is replaced."""
        previous = path.with_name(PREVIOUS)
        temporary = path.with_name(f".{PREVIOUS}")
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        self._write_hashes(previous, [line, *(_hashes(previous)[:1] if previous.exists() else [])])
        os.replace(temporary, previous)

    def _write_hashes(self, path: Path, lines: list[str]) -> None:
        with self._atomic_file(_hashes_of(path)) as stream:
            stream.write("".join(f"{line}\n" for line in dict.fromkeys(lines)).encode())


class Found(NamedTuple):
    """The checkpoint to go on from, and what is to be said of others."""

    path: Path | None
    broken: list[str]


def newest_whole(folder: Path) -> Found:
    """The newest checkpoint of a run's folder that is what was written; None if there is none."""
    paths = sorted(folder.glob("*.ckpt"), key=_age_order, reverse=True)
    broken = []
    for path in paths:
        try:
            check(path)
        except BrokenCheckpointError as error:
            broken.append(str(error))
        else:
            return Found(path, broken)
    return Found(None, broken)


def check(path: Path) -> None:
    """Raise BrokenCheckpointError if a checkpoint is not what was written.

    One without a file of hashes (from elsewhere) is checked by the sums inside it.
    """
    lines = _hashes(path)
    if lines:
        hashing = _Hashing(None)
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                hashing.write(piece)
        if hashing.line() not in lines:
            raise BrokenCheckpointError(
                f"{path} was damaged: it has {hashing.line()}, {_hashes_of(path).name} says "
                f"{lines[0]}"
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise BrokenCheckpointError(f"{path} is no whole checkpoint: {error}") from error
    if damaged:
        raise BrokenCheckpointError(f"{path} was damaged: {damaged} in it has a wrong checksum")


class _Hashing:
    """A stream to write that hashes what goes through; without a stream it hashes alone."""

    def __init__(self, stream: BinaryIO | None) -> None:
        self._stream = stream
        self._digest = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: Any) -> int:
        """Hash and pass on."""
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._size += size
        if self._stream is not None:
            self._stream.write(data)
        return size

    def flush(self) -> None:
        """For torch.save."""
        if self._stream is not None:
            self._stream.flush()

    def line(self) -> str:
        """What went through, as the file of hashes has it."""
        return f"{self._digest.hexdigest()} {self._size}"


def _hashes_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh128")


def _hashes(path: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return _hashes_of(path).read_text(errors="replace").splitlines()
    return []


def _age_order(path: Path) -> tuple[bool, float]:
    """The last one first, then by time: a copied folder's times may be anything."""
    return path.name == LAST, path.stat().st_mtime
