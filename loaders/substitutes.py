"""What takes the place of a sample that cannot be used, where the recipe allows any.

    shard    40 41 42 43        a batch was to hold   7 42 19
                  ✗             it holds              7 43 19, and 43 comes twice in that epoch

The next sample of its shard, behind the last one the first (of an ImageFolder: of the shard that
it would be packed into). That is a function of the sample's number alone, so a batch is the same on
any number of processes, and after a resume.
"""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from ctypes import c_int64
from itertools import accumulate

import numpy as np

from loaders.reader import BadSampleError, Reader
from sharding.process import FROM_SERVER
from sharding.streams import Integers

_NONE = -1


def next_of_shard(counts: Sequence[int], number: int) -> int:
    """PURE: the sample after this one in its shard, behind the last one the first.

    counts: samples of each shard.
    """
    starts = [0, *accumulate(counts)]
    shard = bisect_right(starts, number) - 1
    return number + 1 if number + 1 < starts[shard + 1] else starts[shard]


class KnownBad:
    """The bad samples that a rank has met, `most` at most: memory that its workers share.

    Each worker has a row, which it alone writes.
    """

    def __init__(self, workers: int, most: int) -> None:
        """workers: how many; 0 for none but the training process."""
        self.most = most
        self._numbers = FROM_SERVER.RawArray(c_int64, [_NONE] * max(workers, 1) * most)

    def numbers(self) -> set[int]:
        """All of them."""
        return {*self._numbers} - {_NONE}

    def add(self, row: int, number: int) -> bool:
        """Note one; False if there is no room for it.

        Workers that find some in the same moment may all take the last place.
        """
        known = self.numbers()
        if number in known:
            return True
        if len(known) >= self.most:
            return False
        first = row * self.most
        self._numbers[self._numbers[:].index(_NONE, first, first + self.most)] = number
        return True


class Substitutes:
    """Replaces bad samples in batches that are to be made."""

    def __init__(self, reader: Reader, known: KnownBad) -> None:
        self._reader, self._known = reader, known

    def replace(self, numbers: Integers, bad: BadSampleError, *, row: int) -> Integers:
        """The samples with another one in the place of the bad one, and a line that says so.

        row: of the worker. Raises the error itself where no more bad ones are allowed, or the shard
        has no good one.
        """
        if not self._known.add(row, bad.number):
            raise bad
        known = self._known.numbers()
        other = next_of_shard(self._reader.counts, bad.number)
        while other in known:
            if other == bad.number:
                raise bad
            other = next_of_shard(self._reader.counts, other)
        print(
            f"warning: {bad}; sample {self._reader.key(other)} takes its place ({len(known)} of "
            f"{self._known.most} that data.max_bad_samples allows)",
            file=sys.stderr,
            flush=True,
        )
        return np.where(numbers == bad.number, other, numbers)
