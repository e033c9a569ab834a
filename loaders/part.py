"""A segment on its way into the cache: its bytes, and which of its samples have come.

    .part-NAME         the bytes, each at its final place; locked by the process that fetches
    .part-NAME.rows    a byte for each sample: 1 when its bytes are there, 2 when they are asked for

The process that fetches writes most of it. A reader waits for what was asked for; what was not it
reads by range and adds, so that nothing is fetched twice.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".part-"
_HERE, _ASKED = b"\1", b"\2"
_WAIT_S = 2.0  # for bytes that were asked for; a piece takes a part of a second
_LOOK_S = 0.002


class Part:
    """The two files of one segment, for whoever writes or reads them."""

    def __init__(self, whole: Path) -> None:
        """whole: the segment's path once all of it is there."""
        self._whole = whole
        self._path = whole.with_name(PREFIX + whole.name)
        self._rows = whole.with_name(f"{PREFIX}{whole.name}.rows")

    def read(self, row: int, at: int, size: int) -> bytes | None:
        """A sample's bytes, which lie at `at`; None if they do not come. row: of the segment."""
        with (
            suppress(FileNotFoundError),  # there is none, or it has got its name
            _opened(self._rows, os.O_RDONLY) as rows,
            _opened(self._path, os.O_RDONLY) as file,
        ):
            until = time.monotonic() + _WAIT_S
            while (state := os.pread(rows, 1, row)) == _ASKED:
                if time.monotonic() > until or not _is_locked(file):
                    return None  # the process that asked has died, or the wire has
                time.sleep(_LOOK_S)
            if state == _HERE:
                return os.pread(file, size, at)
        return None

    def add(self, row: int, at: int, data: bytes) -> None:
        """Give a sample's checked bytes to a segment on its way; to no other, or a full disk, not.

        The rows are opened first: if meanwhile another process begins anew, it has rows of its own,
        and what is noted in ours is lost, as are the bytes.
        """
        with (
            suppress(OSError),
            _opened(self._rows, os.O_WRONLY) as rows,
            _opened(self._path, os.O_WRONLY) as file,
        ):
            if os.pwrite(file, data, at) == len(data):
                os.pwrite(rows, _HERE, row)

    @contextmanager
    def fetching(self, *, rows: int, size: int) -> "Iterator[Fetching | None]":
        """The empty files, ours alone to fetch; None if another process has or had them.

        If the block ends well, the segment gets its name; otherwise nothing stays.
        """
        with _opened(self._path, os.O_RDWR | os.O_CREAT) as file:
            if not _lock_if(self._path, file):
                yield None
                return
            try:
                if self._whole.exists():
                    yield None
                    return
                os.ftruncate(file, 0)
                os.ftruncate(file, size)
                self._rows.unlink(missing_ok=True)  # a killed process's, which a reader may hold
                with _opened(self._rows, os.O_RDWR | os.O_CREAT | os.O_EXCL) as here:
                    fcntl.flock(here, fcntl.LOCK_EX)
                    os.ftruncate(here, rows)
                    yield Fetching(file, here, rows)
                    os.rename(self._path, self._whole)
            finally:  # before the lock is given back, so it is nobody else's
                self._path.unlink(missing_ok=True)
                self._rows.unlink(missing_ok=True)


class Fetching:
    """What the one process that fetches a segment does to it."""

    def __init__(self, file: int, here: int, rows: int) -> None:
        """Two descriptors, and the number of samples."""
        self._file, self._here, self._rows = file, here, rows

    def missing(self, row: int) -> range:
        """The first samples from `row` on that have not come, up to one that has; empty: none."""
        here = os.pread(self._here, self._rows - row, row)
        first = here.find(b"\0")
        if first < 0:
            return range(0)
        last = here.find(_HERE, first)
        return range(row + first, self._rows if last < 0 else row + last)

    def ask(self, samples: range) -> None:
        """Say that these samples will be put."""
        os.pwrite(self._here, _ASKED * len(samples), samples.start)

    def put(self, samples: range, at: int, data: bytes) -> None:
        """Write these samples' bytes, which lie from `at` on."""
        piece = memoryview(data)
        while piece:
            written = os.pwrite(self._file, piece, at)
            piece, at = piece[written:], at + written
        os.pwrite(self._here, _HERE * len(samples), samples.start)

    def read(self, at: int, size: int) -> bytes:
        """Bytes that lie from `at` on."""
        return os.pread(self._file, size, at)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Whether another process (or another open file of this one) holds the file for itself."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _lock_if(path: Path, descriptor: int) -> bool:
    """Lock the file if nobody else has and it is still the one of this path."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (BlockingIOError, FileNotFoundError):
        return False
