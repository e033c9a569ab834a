"""Checkpoints in a store, laid out as in a run's folder: whoever copies it has such a folder.

Objects of a store appear whole or not at all. Two that belong together, a checkpoint and its
hashes, are written in an order in which they fit whenever the writer is killed:

    last.previous.ckpt.xxh128   what was there, and what comes
    last.previous.ckpt          a copy of last.ckpt, made by the service
    last.ckpt.xxh128            what was there, and what comes
    last.ckpt                   what comes
    ...xxh128                   each: only what is there now
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from model.checkpoint import LAST, PREVIOUS, AtomicFile
from model.hashes import (
    PIECE,
    BrokenCheckpointError,
    Content,
    Hashing,
    check,
    from_bytes,
    hashes_name,
    is_checkpoints,
    matching,
    step_in,
    to_bytes,
)
from model.newest import Candidate, Taken

_TRIES = 3  # of reading a checkpoint that a running training may be replacing


class Store(Protocol):
    """Where objects are kept; names are plain file names."""

    url: str

    def sizes(self) -> dict[str, int]:
        """Name and size in bytes of every object."""

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    def open(self, name: str) -> Any:
        """The object, with `size` and `read_at(offset, size)`. Raises FileNotFoundError."""

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A stream; the object appears whole when the block ends well, or not at all."""

    def duplicate(self, source: str, target: str) -> None:
        """Give the object a second name. Raises FileNotFoundError if there is none."""

    def delete(self, name: str) -> None:
        """Remove the object if it is there."""

    def sweep(self, ours: Callable[[str], bool]) -> None:
        """Remove what killed writers left half-written of the objects whose names are `ours`."""


class Published:
    """The checkpoints that one run keeps in a store. All methods raise the store's own errors."""

    def __init__(self, store: Store, *, damage: tuple[type[Exception], ...] = ()) -> None:
        """damage: the store's errors of bad bytes."""
        self._store = store
        self._damage = damage
        self._broken: set[str] = set()

    @property
    def url(self) -> str:
        """Where it is."""
        return self._store.url

    def names(self) -> list[str]:
        """The checkpoints that are there."""
        return [name for name in self._store.sizes() if name.endswith(".ckpt")]

    def put(self, name: str, stream: BinaryIO, content: Content) -> None:
        """Publish a checkpoint; last.ckpt becomes last.previous.ckpt.

        stream: stands at its start. Raises BrokenCheckpointError if its bytes are not `content`;
        then the one before stays.
        """
        there = self._store.sizes()
        before = self._contents(name)
        whole = name in there and name not in self._broken
        if name == LAST and whole and any(there[name] == content.size for content in before):
            self._keep(before)
        if before or name not in there:  # one without hashes is checked by the sums inside it
            self._write(name, [content, *before])
        with self._store.create(name) as target:
            hashing = Hashing(target)
            while piece := stream.read(PIECE):
                hashing.write(piece)
            matching([content], hashing.content(), where=f"{name}, on its way to {self.url},")
        self._write(name, [content])
        self._broken.discard(name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint and its hashes."""
        self._store.delete(name)
        self._store.delete(hashes_name(name))

    def sweep(self) -> None:
        """Remove checkpoints that a killed writer left half-written, and nothing of others."""
        self._store.sweep(is_checkpoints)

    def candidates(self, path: Path, atomic_file: AtomicFile) -> list[Candidate]:
        """The checkpoints that are there; one that is taken is fetched into the file `path`."""
        found = []
        for name in self.names():
            steps = [content.step for content in self._contents(name) if content.step is not None]
            unknown = math.inf if name in {LAST, PREVIOUS} else -1
            found.append(
                Candidate(
                    step=max(steps, default=unknown),
                    order=(0, name == LAST, name == PREVIOUS),
                    take=lambda name=name: self.fetch(name, path, atomic_file),  # type: ignore[misc]
                )
            )
        return found

    def fetch(self, name: str, path: Path, atomic_file: AtomicFile) -> Taken:
        """Bring a checkpoint into a file of this machine, checked.

        One that is replaced meanwhile is fetched again. Raises BrokenCheckpointError if it is not
        what was written, FileNotFoundError if there is none.
        """
        broken: tuple[type[Exception], ...] = (BrokenCheckpointError, *self._damage)
        for last_try in (False,) * (_TRIES - 1) + (True,):
            known = self._contents(name)
            try:
                return self._fetch(name, known, path, atomic_file)
            except broken as error:
                if last_try or self._contents(name) == known:
                    self._broken.add(name)
                    raise BrokenCheckpointError(str(error)) from error
        raise AssertionError("unreachable")

    def _fetch(
        self, name: str, known: Sequence[Content], path: Path, atomic_file: AtomicFile
    ) -> Taken:
        where = f"{self.url}/{name}"
        blob = self._store.open(name)
        with atomic_file(path) as stream:
            hashing = Hashing(stream)
            for at in range(0, blob.size, PIECE):
                hashing.write(blob.read_at(at, min(PIECE, blob.size - at)))
            found = hashing.content()
            if known:
                found = matching(known, found, where=where)
        if not known:
            try:
                check(path)
            except BrokenCheckpointError as error:
                path.unlink()
                raise BrokenCheckpointError(str(error).replace(str(path), where, 1)) from error
        return Taken(path, step_in(path) if found.step is None else found.step, where)

    def _keep(self, contents: Sequence[Content]) -> None:
        self._write(PREVIOUS, [*contents, *self._contents(PREVIOUS)])
        with suppress(FileNotFoundError, *self._damage):  # then there is nothing to be kept
            self._store.duplicate(LAST, PREVIOUS)
            self._write(PREVIOUS, contents)

    def _contents(self, name: str) -> tuple[Content, ...]:
        try:
            return from_bytes(self._store.read(hashes_name(name)))
        except FileNotFoundError:
            return ()

    def _write(self, name: str, contents: Sequence[Content]) -> None:
        with self._store.create(hashes_name(name)) as stream:
            stream.write(to_bytes(contents))
