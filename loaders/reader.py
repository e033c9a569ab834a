"""Sample number -> verified bytes: one row of an index and one ranged read."""

import threading
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import xxhash

from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.index import SampleIndex
from sharding.store import Blob
from sharding.streams import Integers

# Shards whose index and file a process keeps open. A rank that reads all 32 lanes of ImageNet
# touches 67 segments at a time.
OPEN_SHARDS = 128

T = TypeVar("T")


class BadSampleError(DataError):
    """Raised for a sample whose own bytes cannot be used; those beside it may be good."""

    def __init__(self, message: str, number: int) -> None:
        """number: the sample's."""
        super().__init__(message)
        self.number = number

    def __reduce__(self) -> tuple[type["BadSampleError"], tuple[str, int]]:
        return BadSampleError, (str(self), self.number)


class Facts(NamedTuple):
    """What is known of samples before their bytes are read: three int64 arrays of equal length."""

    labels: Integers
    widths: Integers
    """In pixels; 0 where unknown."""
    heights: Integers


class Reader(Protocol):
    """A split's samples by number: 0 to sum(counts) - 1, in manifest order."""

    counts: list[int]
    """Samples of each shard."""
    digest: str
    """Identity of the data set."""
    classes: tuple[str, ...]
    remote: bool
    """Whether a read is a request to a server somewhere."""
    cached: int
    """How many reads were answered by the node's cache, in this process."""

    def facts(self, numbers: Integers) -> Facts:
        """Label and size of each sample."""
        ...

    def read(self, number: int) -> bytes:
        """The image's bytes. Raises BadSampleError, naming the sample, if they were changed."""
        ...

    def unopened(self, numbers: Integers) -> list[Callable[[], None]]:
        """What these samples will wait for when they are read; may be called by any thread."""
        ...

    def key(self, number: int) -> str:
        """The sample's key: class folder and file name without extension."""
        ...

    def describe(self, number: int) -> str:
        """Where the sample stands, for people."""
        ...

    def network(self) -> tuple[int, int]:
        """Requests to an object store by this process, and how many of them were tried again."""
        ...


class Opened(Generic[T]):
    """What was opened for each shard, for the last so many; once, however many threads ask."""

    def __init__(self, open_one: Callable[[int], T], most: int = OPEN_SHARDS) -> None:
        self._open, self._most = open_one, most
        self._found: dict[int, T] = {}
        self._opening: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def __contains__(self, shard: int) -> bool:
        return shard in self._found

    def __call__(self, shard: int) -> T:
        """What open_one made of the shard. Raises what that raises, and asks it again next time."""
        with suppress(KeyError):  # `in` and [] are two steps, between which it may be closed
            return self._found[shard]
        with self._lock:
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:
            with suppress(KeyError):  # another thread has opened it meanwhile
                return self._found[shard]
            opened = self._open(shard)
            with self._lock:
                while len(self._found) >= self._most:
                    del self._found[next(iter(self._found))]
                self._found[shard] = opened
                self._opening.pop(shard, None)
            return opened


class ShardReader:
    """Reads the samples of a packed split. It can be handed to other processes before its use."""

    def __init__(self, split: PackedSplit) -> None:
        self.split = split
        self.counts = [shard.samples for shard in split.manifest.shards]
        self.digest = split.manifest.digest
        self.classes = split.manifest.classes
        self.remote = "://" in split.store.url
        self.cached = 0
        self._starts = [0, *accumulate(self.counts)]
        self._make_caches()

    def _make_caches(self) -> None:
        self._index = Opened(self.split.read_index)
        self._tar: Opened[Blob] = Opened(self.split.open_tar)

    def __getstate__(self) -> PackedSplit:
        return self.split

    def __setstate__(self, split: PackedSplit) -> None:
        self.__init__(split)  # type: ignore[misc]  # open files and caches stay behind

    def facts(self, numbers: Integers) -> Facts:
        """See Reader."""
        columns = np.empty((3, len(numbers)), np.int64)
        for column, number in enumerate(numbers.tolist()):
            index, row = self._row(number)
            columns[:, column] = index.table[["label", "width", "height"]][row].tolist()
        return Facts(*columns)

    def read(self, number: int) -> bytes:
        """See Reader. Bytes that fail their check are read once more."""
        shard, row = self._place(number)
        index = self._index(shard)
        offset, size, _, xxh3 = index.table[row].tolist()[:4]
        for attempt in range(2):
            data = self._read(shard, row, offset, size, attempt)
            if xxhash.xxh3_64_intdigest(data) == xxh3:
                return data
        raise BadSampleError(
            f"{self.describe(number)}: the bytes were changed or damaged (XXH3-64 "
            f"{xxhash.xxh3_64_intdigest(data):016x}, the index says {xxh3:016x}); `shard.py "
            "verify` finds all such places",
            number,
        )

    def _read(self, shard: int, row: int, offset: int, size: int, attempt: int) -> bytes:
        del row, attempt
        return self._tar(shard).read_at(offset, size)

    def unopened(self, numbers: Integers) -> list[Callable[[], None]]:
        """See Reader. A shard's index and its tar."""
        shards = np.unique(np.searchsorted(self._starts, numbers, "right") - 1).tolist()
        return [partial(self._open, shard) for shard in shards if shard not in self._tar]

    def _open(self, shard: int) -> None:
        with suppress(OSError, DataError):  # whoever reads the samples will say so
            self._index(shard)
            self._tar(shard)

    def key(self, number: int) -> str:
        """See Reader."""
        index, row = self._row(number)
        return index.key(row)

    def describe(self, number: int) -> str:
        """See Reader."""
        shard, row = self._place(number)
        index = self._index(shard)
        offset = index.table["offset"][row]
        return f"{self.split.where(shard)}, offset {offset}, sample {index.key(row)}"

    def network(self) -> tuple[int, int]:
        """See Reader."""
        counts = getattr(self.split.store, "counts", None)
        return (0, 0) if counts is None else (counts.requests, counts.retries)

    def _place(self, number: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _row(self, number: int) -> tuple[SampleIndex, int]:
        shard, row = self._place(number)
        return self._index(shard), row
