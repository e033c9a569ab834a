"""What takes the place of a sample that cannot be used, where the recipe allows any.

    shard    40 41 42 43        a batch was to hold   7 42 19
                  ✗             it holds              7 43 19, and 43 comes twice in that epoch

The next sample of its shard, behind the last one the first (of an ImageFolder: of the shard that it
would be packed into). That is a function of the sample's number alone, so a batch is the same on any
number of processes, and after a resume.
"""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from loaders.reader import Reader
from loaders.stats import Counters, Stats
from sharding.errors import DataError
from sharding.streams import Integers


class BadSampleError(Exception):
    """Raised where the bytes of one sample cannot be used."""

    def __init__(self, number: int, reason: DataError) -> None:
        super().__init__(str(reason))
        self.number, self.reason = number, reason


def next_of_shard(counts: Sequence[int], number: int) -> int:
    """PURE: the sample after this one in its shard, behind the last one the first.

    counts: samples of each shard.
    """
    starts = [0, *accumulate(counts)]
    shard = bisect_right(starts, number) - 1
    return number + 1 if number + 1 < starts[shard + 1] else starts[shard]


class Substitutes:
    """Replaces bad samples in batches that are to be made, `most` times in all."""

    def __init__(self, reader: Reader, stats: Stats, *, most: int) -> None:
        """stats: of all workers that share the allowance."""
        self._reader, self._stats, self._most = reader, stats, most
        self._bad: set[int] = set()

    def replace(self, numbers: Integers, bad: BadSampleError, *, row: int) -> Integers:
        """The samples with another one in the place of the bad one, and a line that says so.

        row: of the worker's counters. Raises the sample's DataError where none, or no more, may be
        replaced, or the shard has no good one; workers that ask at the same moment may both get the
        last one.
        """
        used = int(self._stats.total().substituted) + 1
        if used > self._most:
            raise bad.reason
        self._bad.add(bad.number)
        other = next_of_shard(self._reader.counts, bad.number)
        while other in self._bad:
            if other == bad.number:
                raise bad.reason
            other = next_of_shard(self._reader.counts, other)
        self._stats.add(row, Counters(substituted=1))
        print(
            f"warning: {bad.reason}; sample {self._reader.key(other)} takes its place ({used} of "
            f"{self._most} that data.max_substitutes allows)",
            file=sys.stderr,
            flush=True,
        )
        return np.where(numbers == bad.number, other, numbers)
