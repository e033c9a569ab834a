"""PURE: who reads what at which step of the real order, and what a node's cache saves."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from loaders.order import Order
from sharding.errors import UsageError
from sharding.streams import Integers

_NEVER = 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Who reads."""

    nodes: int = 1
    ranks_per_node: int = 8
    global_batch: int = 1024
    images_per_s: float = 1000.0
    """That each rank trains."""
    cache_bytes: int = 0
    """Of each node."""

    def __post_init__(self) -> None:
        if self.global_batch % self.world:
            raise UsageError(
                f"the global batch of {self.global_batch} is not divisible by {self.nodes} nodes x "
                f"{self.ranks_per_node} ranks; choose a multiple of {self.world}"
            )
        if not self.images_per_s > 0:
            raise UsageError(f"images a second must be more than 0, got {self.images_per_s}")

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.ranks_per_node


class Uses(NamedTuple):
    """The segments that a node reads of in an epoch, with the steps (of the run) it does so in."""

    segments: Integers
    first: Integers
    last: Integers


class Misses(NamedTuple):
    """What a node's cache did not hold in an epoch."""

    fetched: list[int]
    """Segments that were fetched whole."""
    ranged: list[int]
    """Segments read sample by sample, for want of room."""


class NodeCache:
    """The segments that a node's cache holds: open ones, and idle ones, which can be dropped."""

    def __init__(self, segment_bytes: Sequence[int], capacity: int) -> None:
        self._bytes = segment_bytes
        self._room = capacity
        self._idle_bytes = 0
        self._idle: dict[int, int] = {}  # segment -> step in which it is used again
        self._farthest: list[tuple[int, int]] = []  # the same as a heap; some are outdated
        self._open: list[tuple[int, int]] = []  # heap of (last step, segment)

    def begin(self, again: Mapping[int, int]) -> None:
        """An epoch begins. What it does not use may be used after it: `again`, see close_before."""
        for segment, use in self._idle.items():
            if use == _NEVER and segment in again:
                self._idle[segment] = again[segment]
                heapq.heappush(self._farthest, (-again[segment], -segment))

    def close_before(self, step: int, again: Mapping[int, int]) -> None:
        """Let what is finished become idle; `again` tells when each is used in the next epoch."""
        while self._open and self._open[0][0] < step:
            _, segment = heapq.heappop(self._open)
            self._idle[segment] = again.get(segment, _NEVER)
            self._idle_bytes += self._bytes[segment]
            heapq.heappush(self._farthest, (-self._idle[segment], -segment))

    def reopen(self, segment: int, last: int) -> bool:
        """Use the segment if it is here, until step `last`."""
        if self._idle.pop(segment, None) is None:
            return False
        self._idle_bytes -= self._bytes[segment]
        heapq.heappush(self._open, (last, segment))
        return True

    def fetch(self, segment: int, last: int) -> bool:
        """Make room for the segment and use it until step `last`; False if there is not enough."""
        size = self._bytes[segment]
        if size > self._room + self._idle_bytes:
            return False
        while size > self._room:
            use, victim = (-part for part in heapq.heappop(self._farthest))
            if self._idle.get(victim) == use:
                del self._idle[victim]
                self._idle_bytes -= self._bytes[victim]
                self._room += self._bytes[victim]
        self._room -= size
        heapq.heappush(self._open, (last, segment))
        return True


def sample_edges(counts: Sequence[int], sizes: Sequence[int]) -> Integers:
    """Where each sample begins (int64) when all shards lie end to end, and where the last ends."""
    pieces, begin = [], 0
    for count, size in zip(counts, sizes, strict=True):
        pieces.append(begin + np.arange(count, dtype=np.int64) * size // count)
        begin += size
    return np.concatenate([*pieces, np.array([begin], np.int64)])


def segment_edges(order: Order, counts: Sequence[int]) -> tuple[Integers, Integers]:
    """First number, and last + 1, of each segment of all lanes, sorted."""
    starts = np.cumsum([0, *counts])
    edges = [
        (starts[segment.shard] + segment.first, starts[segment.shard] + segment.last)
        for lane in range(order.config.lanes)
        for segment in order.segments(lane)
    ]
    first, last = np.array(sorted(edges), np.int64).T
    return first, last


def positions(order: Order, epoch: int) -> Integers:
    """Sample number of each position of the epoch."""
    numbers = np.empty(order.samples, np.int64)
    lanes = order.config.lanes
    for lane in range(min(lanes, order.samples)):
        numbers[lane::lanes] = order.lane(epoch, lane)
    return numbers


def ranks_of_positions(order: Order, cluster: Cluster) -> Integers:
    """The rank that reads each position of the epoch's whole batches; the same in every epoch."""
    batch, lanes = cluster.global_batch, order.config.lanes

    @cache
    def pattern(offset: int) -> Integers:
        """The ranks of a batch that begins in this lane."""
        ranks = np.empty(batch, np.int64)
        by_lane = np.argsort((offset + np.arange(batch)) % lanes, kind="stable")
        ranks[by_lane] = np.arange(batch) // (batch // cluster.world)
        return ranks

    return np.concatenate([pattern(s * batch % lanes) for s in range(order.steps(batch))])


def uses_of(segments: Integers, steps: Integers) -> Uses:
    """Of a node's samples in the order of time: segment and step of each."""
    found, first = np.unique(segments, return_index=True)
    _, from_end = np.unique(segments[::-1], return_index=True)
    return Uses(found, steps[first], steps[::-1][from_end])


def open_at_worst(uses: Uses, segment_bytes: Sequence[int]) -> tuple[int, int]:
    """The most segments, and the most bytes of segments, that are open in one step."""
    if not len(uses.segments):
        return 0, 0
    begin = int(uses.first.min())
    changes = np.zeros((2, int(uses.last.max()) - begin + 2), np.int64)
    size = np.array(segment_bytes, np.int64)[uses.segments]
    for row, amount in enumerate((np.ones_like(size), size)):
        np.add.at(changes[row], uses.first - begin, amount)
        np.add.at(changes[row], uses.last - begin + 1, -amount)
    segments, total = changes.cumsum(axis=1).max(axis=1).tolist()
    return segments, total


def cache_misses(
    epochs: Sequence[Uses], segment_bytes: Sequence[int], capacity: int
) -> list[Misses]:
    """What an empty cache of `capacity` bytes lacks in all epochs but the last one.

    The last one only says what will be needed. A segment comes when it is first used in an epoch,
    stays while it is open, and then until another needs its room. What is used again last goes
    first; of those that are never used again, that of the highest number.
    """
    cache = NodeCache(segment_bytes, capacity)
    found = []
    for now, then in pairwise(epochs):
        again = dict(zip(then.segments.tolist(), then.first.tolist(), strict=True))
        cache.begin(again)
        misses = Misses([], [])
        uses = np.stack([now.first, now.segments, now.last], axis=1)
        for step, group in groupby(sorted(uses.tolist()), key=lambda use: use[0]):
            cache.close_before(step, again)
            missing = [use for use in group if not cache.reopen(use[1], use[2])]
            for _, segment, last in missing:
                fits = cache.fetch(segment, last)
                (misses.fetched if fits else misses.ranged).append(segment)
        cache.close_before(_NEVER, again)
        found.append(misses)
    return found


def shard_opens(rank_of: Integers, shard_of: Integers, workers: int) -> int:
    """Files opened in an epoch: tar and index, by each worker of a rank that reads of the shard."""
    shards = int(shard_of.max()) + 1
    _, samples = np.unique(rank_of * shards + shard_of, return_counts=True)
    return 2 * int(np.minimum(samples, workers).sum())
