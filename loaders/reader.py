"""Sample number -> verified bytes: one row of an index and one ranged read."""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

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
        """The image's bytes. Raises DataError, naming the sample, if they were changed."""
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
        self._index = lru_cache(OPEN_SHARDS)(self.split.read_index)
        self._tar = lru_cache(OPEN_SHARDS)(self.split.open_tar)

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
        raise DataError(
            f"{self.describe(number)}: the bytes were changed or damaged (XXH3-64 "
            f"{xxhash.xxh3_64_intdigest(data):016x}, the index says {xxh3:016x}); `shard.py "
            "verify` finds all such places"
        )

    def _read(self, shard: int, row: int, offset: int, size: int, attempt: int) -> bytes:
        del row, attempt
        blob: Blob = self._tar(shard)
        return blob.read_at(offset, size)

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
