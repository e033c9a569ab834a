"""The file of hashes beside a checkpoint: what may stand in it.

    last.ckpt.xxh128    dc1f...e9 93847261 1200      XXH3-128, bytes, global step if it is known

It has one line. While the checkpoint is replaced, it has one for the new content and one for each
that may still be there: whenever a writer is killed, the two fit.
"""

import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from model.first_line import first_line

PIECE = 8 << 20
"""Bytes that are read and hashed at once."""

_LINE = re.compile(r"([0-9a-f]{32}) (\d{1,15})(?: (\d{1,15}))?")


class BrokenCheckpointError(ValueError):
    """Raised for a checkpoint that is not what was written; says how."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds."""

    digest: str
    """XXH3-128, 32 hexadecimal digits."""
    size: int
    step: int | None = field(default=None, compare=False)
    """Optimizer steps of the run when it was written; None: not known."""

    def __str__(self) -> str:
        step = "" if self.step is None else f" {self.step}"
        return f"{self.digest} {self.size}{step}"


def hashes_name(name: str) -> str:
    """Name of a checkpoint's file of hashes."""
    return f"{name}.xxh128"


def is_checkpoints(name: str) -> bool:
    """Whether a file of this name is a checkpoint, or its hashes."""
    return name.endswith((".ckpt", hashes_name(".ckpt")))


def to_bytes(contents: Iterable[Content]) -> bytes:
    """The file of hashes: each content once."""
    return "".join(f"{content}\n" for content in dict.fromkeys(contents)).encode()


def from_bytes(data: bytes) -> tuple[Content, ...]:
    """What a file of hashes says; lines that were torn or damaged are left out."""
    found = map(_LINE.fullmatch, data.decode(errors="replace").splitlines())
    return tuple(
        Content(match[1], int(match[2]), None if match[3] is None else int(match[3]))
        for match in found
        if match
    )


class Hashing:
    """A stream to write that hashes what goes through; without a stream it hashes alone."""

    def __init__(self, stream: BinaryIO | None = None) -> None:
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

    def content(self, step: int | None = None) -> Content:
        """What went through."""
        return Content(self._digest.hexdigest(), self._size, step)


def hashes_path(path: Path) -> Path:
    """The file of hashes beside a checkpoint."""
    return path.with_name(hashes_name(path.name))


def read_hashes(path: Path) -> tuple[Content, ...]:
    """What may stand in a checkpoint; () if its file of hashes is missing or holds none."""
    with suppress(FileNotFoundError):
        return from_bytes(hashes_path(path).read_bytes())
    return ()


def content_of(path: Path) -> Content:
    """What stands in a file; its step is not known."""
    hashing = Hashing()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            hashing.write(piece)
    return hashing.content()


def check(path: Path) -> Content:
    """What a checkpoint holds. Raises BrokenCheckpointError if it is not what was written.

    One without hashes (from elsewhere, or they were lost) is checked by the sums inside it.
    """
    known = read_hashes(path)
    if known:
        return matching(known, content_of(path), where=str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise BrokenCheckpointError(f"{path} is no whole checkpoint: {error}") from error
    if damaged:
        raise BrokenCheckpointError(f"{path} was damaged: {damaged} in it has a wrong checksum")
    return content_of(path)


def matching(known: Iterable[Content], found: Content, *, where: str) -> Content:
    """The one of the known contents that was found. Raises BrokenCheckpointError."""
    known = tuple(known)
    for content in known:
        if content == found:
            return content
    raise BrokenCheckpointError(
        f"{where} was damaged: it has {found}, its file of hashes says {known[0]}"
    )


def step_in(path: Path) -> int:
    """The global step that a whole checkpoint was written at; -1 if it does not say so.

    Raises BrokenCheckpointError for a file that cannot be loaded.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise BrokenCheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    step = checkpoint.get("global_step", -1) if isinstance(checkpoint, dict) else -1
    return step if isinstance(step, int) else -1
