"""PURE: which samples make up global batch s of epoch e, and which rank reads which of them.

Everything random is computed from (seed, epoch); nothing is drawn from a buffer, so the position in
an epoch is one integer and any position can be the first one.

1. Deal, once for a run: permute the shards, lay them end to end, and cut the line of N samples
   into L lanes whose lengths differ by at most one. A lane is a list of segments (parts of shards).

       line     |----shard 4----|--shard 0--|-----shard 2-----|--shard 1--|-shard 3-|
       lanes    |------- lane 0 -------|------- lane 1 -------|------ lane 2 ------|

2. Each epoch, in each lane: permute its segments, permute the samples inside each segment, then
   mix neighbours: a sample moves by less than `window` places, so a lane has some two shards open.
3. Position g of the epoch is sample g // L of lane g % L; batch s of B takes sB to (s + 1)B - 1.
4. A batch is sorted by lane, and rank r of W takes its r-th W-th part, so ranks of one node read
   neighbouring lanes, and the batch holds the same samples whatever W is.

       B = 8, L = 4    lanes   0 0 1 1 2 2 3 3
       W = 2           ranks   0 0 0 0 1 1 1 1

A sample's number is its place when the shards lie end to end in manifest order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sharding.errors import UsageError
from sharding.streams import Integers, Purpose, permutation, raw


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """What decides the order beside the data set: part of a run's identity."""

    seed: int = 0
    lanes: int = 32
    window: int = 1024
    """Places by which a sample is moved away from its segment, at most."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in 0..2^64-1, got {self.seed}")
        if not 1 <= self.lanes <= 1 << 20:
            raise ValueError(f"lanes must be in 1..2^20, got {self.lanes}")
        if not 1 <= self.window <= 1 << 24:
            raise ValueError(f"window must be in 1..2^24, got {self.window}")


class Segment(NamedTuple):
    """Samples first..last-1 of one shard, which stand in one lane. `item` names its streams."""

    shard: int
    first: int
    last: int
    item: int


class Order:
    """The order of one data set (its shards' sample counts) under one OrderConfig."""

    def __init__(self, counts: Sequence[int], config: OrderConfig) -> None:
        self.config = config
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._line = permutation(len(counts), seed=config.seed, purpose=Purpose.DEAL)
        self._line_ends = np.cumsum(np.asarray(counts, np.int64)[self._line])
        self.samples = int(self._starts[-1])

    def steps(self, batch: int) -> int:
        """Whole global batches in an epoch; its last samples % batch positions are left out.

        Raises UsageError if there is not even one.
        """
        if batch > self.samples:
            raise UsageError(
                f"the data set's {self.samples} samples are fewer than one global batch of {batch}"
            )
        return self.samples // batch

    def place(self, number: int) -> tuple[int, int]:
        """Shard and row of a sample's number."""
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        return shard, number - int(self._starts[shard])

    def number(self, shard: int, row: int) -> int:
        """A sample's number by shard and row."""
        return int(self._starts[shard]) + row

    def segments(self, lane: int) -> list[Segment]:
        """The lane's parts of shards; the same in every epoch."""
        first, last = self._lane_start(lane), self._lane_start(lane + 1)
        found = []
        # Positions in the line of the shards that the lane touches. Position + lane differs
        # between any two segments, since from one to the next at least one of the two advances.
        if first < last:
            begin = int(np.searchsorted(self._line_ends, first, "right"))
            end = int(np.searchsorted(self._line_ends, last, "left"))
            for at in range(begin, end + 1):
                shard = int(self._line[at])
                shard_end = int(self._line_ends[at])
                shard_start = shard_end - int(self._starts[shard + 1] - self._starts[shard])
                found.append(
                    Segment(
                        shard=shard,
                        first=max(first, shard_start) - shard_start,
                        last=min(last, shard_end) - shard_start,
                        item=at + lane,
                    )
                )
        return found

    def lane(self, epoch: int, lane: int) -> Integers:
        """Numbers (int64) of the lane's samples in the epoch's order."""
        segments = self.segments(lane)
        seed = self.config.seed
        pieces = [np.zeros(0, np.int64)]
        for i in permutation(
            len(segments), seed=seed, purpose=Purpose.SEGMENTS, epoch=epoch, item=lane
        ):
            shard, first, last, item = segments[i]
            inside = permutation(
                last - first, seed=seed, purpose=Purpose.SAMPLES, epoch=epoch, item=item
            )
            pieces.append(self._starts[shard] + first + inside)
        numbers = np.concatenate(pieces)
        # Sort by i + uniform(0, window), in fixed point with 20 bits behind the point.
        shift = raw(len(numbers), seed=seed, purpose=Purpose.JITTER, epoch=epoch, item=lane)
        scale = np.uint64(1 << 20)
        keys = np.arange(len(numbers), dtype=np.uint64) * scale
        keys += shift % (np.uint64(self.config.window) * scale)
        return numbers[np.argsort(keys, kind="stable")]

    def part(
        self,
        *,
        epoch: int,
        step: int,
        batch: int,
        rank: int,
        world: int,
        lanes: "Lanes | None" = None,
    ) -> Integers:
        """Numbers (int64) of rank's samples of global batch `step`, in the batch's order.

        Parts of all ranks, one after the other, are the whole batch. `lanes` keeps lanes between
        calls; without it those that are touched are computed anew.
        """
        if batch % world or not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} has no equal part of a batch of {batch}")
        if not 0 <= step < self.steps(batch):
            raise ValueError(f"step {step} is not in 0..{self.steps(batch) - 1}")
        positions = np.arange(step * batch, (step + 1) * batch)
        by_lane = positions[np.argsort(positions % self.config.lanes, kind="stable")]
        mine = by_lane[rank * (batch // world) : (rank + 1) * (batch // world)]
        lanes = lanes or Lanes(self)
        numbers = np.empty(len(mine), np.int64)
        mine_lanes = mine % self.config.lanes
        for lane in np.unique(mine_lanes):
            here = mine_lanes == lane
            numbers[here] = lanes.get(epoch, int(lane))[mine[here] // self.config.lanes]
        return numbers

    def _lane_start(self, lane: int) -> int:
        """Where the lane begins in the line; the first samples % lanes lanes have one more."""
        each, more = divmod(self.samples, self.config.lanes)
        return lane * each + min(lane, more)


class Lanes:
    """Lanes of the epoch at hand, computed when first asked for and dropped with the epoch."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._epoch = -1
        self._lanes: dict[int, Integers] = {}

    def get(self, epoch: int, lane: int) -> Integers:
        """See Order.lane."""
        if epoch != self._epoch:
            self._epoch, self._lanes = epoch, {}
        if lane not in self._lanes:
            self._lanes[lane] = self._order.lane(epoch, lane)
        return self._lanes[lane]
