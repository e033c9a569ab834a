"""A cache of shards in a folder of the node, shared by all its processes.

    CACHE/<digest of the data set>/<hash of the tar>-<first>-<last>      a segment's bytes
    CACHE/<digest of the data set>/<hash of the index>.npy               a shard's index

A segment is fetched into a temporary file under a lock, its samples are checked, and it gets its
name by a rename: what has a name is whole. The lock of a dead process is free. What is not there
(yet) is read by range from the store, so that nobody waits for a whole segment.
"""

import fcntl
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import xxhash

from loaders.order import Segment
from loaders.reader import ShardReader
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.index import SampleIndex
from sharding.store import atomic_file

_PIECE = 8 << 20
_PART = ".part-"
_INDEXES = 256


class SegmentCache:
    """The cached segments of one packed split. It can be handed to other processes."""

    def __init__(self, folder: Path, split: PackedSplit) -> None:
        """folder: the cache, in which the data set gets a folder of its own."""
        self._folder, self.split = folder, split
        self.folder = folder / split.manifest.digest
        self.index = lru_cache(_INDEXES)(self._read_index)

    def __reduce__(self) -> tuple[type["SegmentCache"], tuple[Path, PackedSplit]]:
        return SegmentCache, (self._folder, self.split)

    def name(self, segment: Segment) -> str:
        """The segment's file name: of its content, so that a copy of the data set shares it."""
        shard = self.split.manifest.shards[segment.shard]
        return f"{shard.xxh128}-{segment.first}-{segment.last}"

    def sizes(self) -> dict[str, int]:
        """Name and bytes of what is there."""
        found = {}
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and not entry.name.endswith(".npy"):
                    with suppress(FileNotFoundError):
                        found[entry.name] = entry.stat().st_size
        return found

    def read(self, segment: Segment, offset: int, size: int) -> bytes | None:
        """Bytes of the tar from `offset`, None if the segment is not (or no more) there."""
        name = self.name(segment)
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            whole = True
        except FileNotFoundError:
            try:  # it is on its way; what has come can be read, and the reader checks it
                descriptor = os.open(self.folder / f"{_PART}{name}", os.O_RDONLY | os.O_CLOEXEC)
                whole = False
            except FileNotFoundError:
                return None
        try:
            if whole:
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # it is not deleted while we read
            data = os.pread(descriptor, size, offset - self._range(segment)[0])
        finally:
            os.close(descriptor)
        return data if len(data) == size else None

    def fill(self, segment: Segment) -> int:
        """Fetch a segment; returns the bytes read from the store, 0 if it is there or on its way.

        Raises DataError if its samples are not what the index says.
        """
        name = self.name(segment)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / name).exists():
            return 0
        start, stop = self._range(segment)
        blob = self.split.open_tar(segment.shard)
        with self._turn(name) as descriptor:
            if descriptor is None or (self.folder / name).exists():
                return 0
            os.ftruncate(descriptor, 0)
            for at in range(start, stop, _PIECE):
                piece = memoryview(blob.read_at(at, min(_PIECE, stop - at)))
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
            self._check(segment, descriptor, start)
            os.rename(self.folder / f"{_PART}{name}", self.folder / name)
        return stop - start

    def drop(self, segment: Segment) -> bool:
        """Delete a segment, unless somebody reads it just now; whether it is gone."""
        return self._delete(self.name(segment))

    def sweep(self) -> None:
        """Delete what killed processes left half-fetched."""
        for path in self.folder.glob(f"{_PART}*"):
            self._delete(path.name)

    def _delete(self, name: str) -> bool:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.folder / name).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    @contextmanager
    def _turn(self, name: str) -> Iterator[int | None]:
        """The temporary file of a segment, locked; None if another process has it.

        If the block fails, or does not give the file its name, it is deleted.
        """
        path = self.folder / f"{_PART}{name}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _lock_if(path, descriptor):
                yield None
                return
            try:
                yield descriptor
            finally:
                with suppress(FileNotFoundError):
                    if os.path.samestat(path.stat(), os.fstat(descriptor)):
                        path.unlink()
        finally:
            os.close(descriptor)

    def _check(self, segment: Segment, descriptor: int, start: int) -> None:
        index = self.index(segment.shard)
        for row in range(segment.first, segment.last):
            offset, size, _, xxh3 = index.table[row].tolist()[:4]
            if xxhash.xxh3_64_intdigest(os.pread(descriptor, size, offset - start)) != xxh3:
                raise DataError(
                    f"{self.split.where(segment.shard)}, offset {offset}, sample {index.key(row)}: "
                    "the bytes were changed or damaged; `shard.py verify` finds all such places"
                )

    def _range(self, segment: Segment) -> tuple[int, int]:
        """Where the segment's images begin and end in the tar."""
        table = self.index(segment.shard).table
        last = table[segment.last - 1]
        return int(table["offset"][segment.first]), int(last["offset"]) + int(last["size"])

    def _read_index(self, shard: int) -> SampleIndex:
        facts = self.split.manifest.shards[shard]
        path = self.folder / f"{facts.index_xxh128}.npy"
        with self._one_at_a_time(path.name):
            with suppress(FileNotFoundError, DataError):
                return SampleIndex.from_bytes(path.read_bytes(), shard=facts, where=str(path))
            index = self.split.read_index(shard)
            with suppress(OSError), atomic_file(path) as stream:  # a full disk stops nobody
                stream.write(index.to_bytes())
            return index

    @contextmanager
    def _one_at_a_time(self, name: str) -> Iterator[None]:
        """Wait until no other process or thread does this; without a folder to lock in, don't."""
        path = self.folder / f"{_PART}{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            path.unlink(missing_ok=True)  # who waits for it finds what we made
            os.close(descriptor)


def _lock_if(path: Path, descriptor: int) -> bool:
    """Lock the file if nobody else has and it is still the one of this path."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (BlockingIOError, FileNotFoundError):
        return False


class CachedReader(ShardReader):
    """Reads from the cache what is there, everything else by range from the store."""

    def __init__(self, cache: SegmentCache, segments: Iterable[Segment]) -> None:
        """segments: those that may be in the cache; they do not overlap."""
        super().__init__(cache.split)
        self._cache = cache
        self._by_shard: dict[int, list[Segment]] = {}
        for segment in sorted(segments):
            self._by_shard.setdefault(segment.shard, []).append(segment)
        self._index = cache.index

    def __reduce__(self) -> tuple[type["CachedReader"], tuple[SegmentCache, list[Segment]]]:
        return CachedReader, (self._cache, [s for each in self._by_shard.values() for s in each])

    def _read(self, shard: int, row: int, offset: int, size: int, attempt: int) -> bytes:
        segment = self._segment(shard, row)
        if segment is not None:
            if attempt:  # its bytes were wrong
                self._cache.drop(segment)
            elif data := self._cache.read(segment, offset, size):
                self.cached += 1
                return data
        return super()._read(shard, row, offset, size, attempt)

    def _segment(self, shard: int, row: int) -> Segment | None:
        segments = self._by_shard.get(shard, [])
        at = bisect_right(segments, row, key=lambda segment: segment.first) - 1
        return segments[at] if at >= 0 and row < segments[at].last else None
