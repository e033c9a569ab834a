"""A cache of shards in a folder of the node, shared by all its processes.

    CACHE/<digest of the data set>/<hash of the tar>-<first>-<last>      a segment's bytes
    CACHE/<digest of the data set>/<hash of the index>.npy               a shard's index

A segment is fetched into a temporary file under a lock (see part.py), its samples are checked, and
it gets its name by a rename: what has a name is whole. The lock of a dead process is free. What is
not there (yet) is read by range from the store, so that nobody waits for a whole segment.
"""

import fcntl
import os
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import xxhash

from loaders.eviction import claim, delete, make_room
from loaders.order import Segment
from loaders.part import PREFIX, Fetching, Part
from loaders.reader import Opened, ShardReader
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.index import SampleIndex
from sharding.store import atomic_file

_PIECE = 4 << 20  # of a segment, fetched by one request
_INDEXES = 256
_WAIT_S = 10.0  # for another process that fetches an index
_LOOK_S = 0.005


class SegmentCache:
    """The cached segments of one packed split. It can be handed to other processes."""

    def __init__(self, folder: Path, split: PackedSplit) -> None:
        """folder: the cache, in which the data set gets a folder of its own."""
        self._folder, self.split = folder, split
        self.folder = folder / split.manifest.digest
        self.index = Opened(self._read_index, _INDEXES)

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

    def read(self, segment: Segment, row: int, offset: int, size: int) -> bytes | None:
        """A sample's bytes, None if they cannot be had here. Who reads checks them."""
        at = offset - self._range(segment)[0]
        with suppress(OSError):  # another user's file, a failing disk: the store has the bytes
            data = self._read(segment, row - segment.first, at, size)
            return data if data is not None and len(data) == size else None
        return None

    def _read(self, segment: Segment, row: int, at: int, size: int) -> bytes | None:
        try:
            descriptor = os.open(self.folder / self.name(segment), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return self._part(segment).read(row, at, size)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # it is not deleted while we read
            return os.pread(descriptor, size, at)
        finally:
            os.close(descriptor)

    def add(self, segment: Segment, row: int, offset: int, data: bytes) -> None:
        """Give a sample that was read by range to its segment, if that is on its way."""
        if xxhash.xxh3_64_intdigest(data) == self.index(segment.shard).table["xxh3"][row]:
            self._part(segment).add(row - segment.first, offset - self._range(segment)[0], data)

    def fill(self, segment: Segment) -> int:
        """Fetch a segment; returns the bytes read from the store, 0 if it is there or on its way.

        Raises DataError if its samples are not what the index says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / self.name(segment)).exists():
            return 0
        start, stop = self._range(segment)
        blob = self.split.open_tar(segment.shard)
        rows = segment.last - segment.first
        fetched = 0
        with self._part(segment).fetching(rows=rows, size=stop - start) as part:
            if part is None:
                return 0
            row = 0
            while run := part.missing(row):
                row = self._piece(segment, run)
                samples = range(run.start, row)
                begin, end = self._range(segment, run.start, row)
                part.ask(samples)
                part.put(samples, begin - start, blob.read_at(begin, end - begin))
                fetched += end - begin
            self._check(segment, part, start)
        return fetched

    def drop(self, segment: Segment) -> bool:
        """Delete a segment, unless somebody reads it just now; whether it is gone."""
        return delete(self.folder / self.name(segment))

    def sweep(self) -> None:
        """Delete what killed processes left half-fetched."""
        for path in self.folder.glob(f"{PREFIX}*"):
            delete(path)

    def claim(self, segments: Iterable[Segment]) -> None:
        """Say that these segments, and the indexes, are wanted: see eviction.py."""
        claim([self.folder / self.name(segment) for segment in segments])
        claim(self.folder.glob("*.npy"))

    def make_room(self, *, coming: int, limit: int) -> int:
        """Let the whole folder, other data sets included, keep to a limit: see eviction.py."""
        return make_room(self._folder, coming=coming, limit=limit)

    def _part(self, segment: Segment) -> Part:
        return Part(self.folder / self.name(segment))

    def _piece(self, segment: Segment, run: range) -> int:
        """Where the samples end that are fetched by one request: rows of the segment."""
        offsets = self.index(segment.shard).table["offset"][segment.first : segment.last]
        most = int(offsets[run.start]) + _PIECE
        return max(run.start + 1, min(run.stop, int(np.searchsorted(offsets, most))))

    def _check(self, segment: Segment, part: Fetching, start: int) -> None:
        index = self.index(segment.shard)
        for row in range(segment.first, segment.last):
            offset, size, _, xxh3 = index.table[row].tolist()[:4]
            if xxhash.xxh3_64_intdigest(part.read(offset - start, size)) != xxh3:
                raise DataError(
                    f"{self.split.where(segment.shard)}, offset {offset}, sample {index.key(row)}: "
                    "the bytes were changed or damaged; `shard.py verify` finds all such places"
                )

    def _range(self, segment: Segment, first: int = 0, last: int = 0) -> tuple[int, int]:
        """Where the images of rows first..last-1 of the segment (0: to its end) lie in the tar."""
        table = self.index(segment.shard).table[segment.first : segment.last]
        end = table[(last or len(table)) - 1]
        return int(table["offset"][first]), int(end["offset"]) + int(end["size"])

    def _read_index(self, shard: int) -> SampleIndex:
        facts = self.split.manifest.shards[shard]
        path = self.folder / f"{facts.index_xxh128}.npy"
        with self._one_at_a_time(path.name):
            with suppress(OSError, DataError):  # none, another user's, damaged: the store has it
                return SampleIndex.from_bytes(path.read_bytes(), shard=facts, where=str(path))
            index = self.split.read_index(shard)
            with suppress(OSError), atomic_file(path) as stream:  # a full disk stops nobody
                stream.write(index.to_bytes())
            return index

    @contextmanager
    def _one_at_a_time(self, name: str) -> Iterator[None]:
        """Wait until no other process or thread does this, but not for one that has stopped.

        Where there is no folder to lock in, do not wait.
        """
        path = self.folder / f"{PREFIX}{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            yield
            return
        try:
            until = time.monotonic() + _WAIT_S
            while not _lock(descriptor) and time.monotonic() < until:
                time.sleep(_LOOK_S)
            yield
        finally:
            with suppress(OSError):  # one who did not wait for us has removed it
                path.unlink()  # who waits for it finds what we made
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
        if segment is None:
            return super()._read(shard, row, offset, size, attempt)
        if attempt:  # its bytes were wrong
            self._cache.drop(segment)
        elif data := self._cache.read(segment, row, offset, size):
            self.cached += 1
            return data
        data = super()._read(shard, row, offset, size, attempt)
        self._cache.add(segment, row, offset, data)
        return data

    def _segment(self, shard: int, row: int) -> Segment | None:
        segments = self._by_shard.get(shard, [])
        at = bisect_right(segments, row, key=lambda segment: segment.first) - 1
        return segments[at] if at >= 0 and row < segments[at].last else None
