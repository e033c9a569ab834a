"""Checkpoints on disk: written whole or not at all, checked when read, loaded without running code.

last.ckpt             the newest
last.ckpt.xxh128      what may stand in it: see hashes.py
last.previous.ckpt    the one before, with its own .xxh128
"""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from model.hashes import (
    BrokenCheckpointError,
    Content,
    Hashing,
    check,
    content_of,
    hashes_path,
    read_hashes,
    to_bytes,
)
from model.sharing import among_ranks, shared_stream

LAST = "last.ckpt"
PREVIOUS = "last.previous.ckpt"

AtomicFile = Callable[[Path], AbstractContextManager[BinaryIO]]
"""Opens a file that appears whole when its block ends well, or not at all."""


class Publisher(Protocol):
    """Makes checkpoints known in a second place, without holding training."""

    def publish(self, path: Path, content: Content) -> None:
        """A whole checkpoint was written here."""

    def remove(self, name: str) -> None:
        """It is wanted no more."""

    def close(self) -> None:
        """Nothing comes any more: finish what is under way."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint by a whole new one, or leaves it as it was.

    Lightning's own goes through the system's temporary folder; when that is on another file system,
    a full disk destroys the checkpoint that it was about to replace.
    """

    def __init__(self, atomic_file: AtomicFile, publisher: Publisher | None = None) -> None:
        self._atomic_file = atomic_file
        self._publisher = publisher
        self._written: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint. last.ckpt becomes last.previous.ckpt.

        The file of hashes is written before the checkpoint gets its name, and names the new content
        and what is there: a kill in between leaves a pair that fits, too.
        """
        path = Path(path)
        with self._atomic_file(path) as stream:
            hashing = Hashing(stream)
            try:
                torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # all that it calls is there
            except RuntimeError as error:  # torch's, which hides what the disk said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            before = self._contents(path)
            if before and path.name == LAST and self._is_whole(path):
                self._keep(path, before)
            content = hashing.content(checkpoint.get("global_step"))
            self._write_hashes(path, [content, *before])
        self._write_hashes(path, [content])
        self._written.add(path)
        if self._publisher is not None:
            self._publisher.publish(path, content)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values only: a checkpoint from elsewhere cannot run code.

        Where there are several ranks all load the same one, see shared_stream. Raises
        BrokenCheckpointError if the file is not what was written.
        """
        source: Path | BinaryIO = Path(path)
        if among_ranks():
            source = shared_stream(Path(path))
        else:
            check(Path(path))
        checkpoint: dict[str, Any] = torch.load(
            source, map_location=map_location, weights_only=True
        )
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint and its hashes."""
        super().remove_checkpoint(path)
        hashes_path(Path(path)).unlink(missing_ok=True)
        if self._publisher is not None:
            self._publisher.remove(Path(path).name)

    def teardown(self) -> None:
        """The run is over: what is still to be published is."""
        if self._publisher is not None:
            self._publisher.close()

    def _keep(self, path: Path, contents: Iterable[Content]) -> None:
        """Give the last checkpoint a second name, which stays when the first one is replaced."""
        previous = path.with_name(PREVIOUS)
        temporary = path.with_name(f".tmp-{PREVIOUS}-link")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            with path.open("rb") as source, self._atomic_file(temporary) as target:
                shutil.copyfileobj(source, target)
        self._write_hashes(previous, [*contents, *self._contents(previous)])
        os.replace(temporary, previous)
        self._write_hashes(previous, contents)

    def _contents(self, path: Path) -> tuple[Content, ...]:
        """What may stand in a file now; () if there is none."""
        if not path.exists():
            return ()
        return read_hashes(path) or (content_of(path),)

    def _is_whole(self, path: Path) -> bool:
        """Whether it may replace the one before; looked at in files that others wrote."""
        if path not in self._written:
            try:
                check(path)
            except BrokenCheckpointError:
                return False
        return True

    def _write_hashes(self, path: Path, contents: Iterable[Content]) -> None:
        with self._atomic_file(hashes_path(path)) as stream:
            stream.write(to_bytes(contents))
