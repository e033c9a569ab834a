"""PURE: which segments a rank needs, from which step of an epoch to which.

A segment (a lane's part of a shard) is the unit of fetching and caching. It is the same in every
epoch, and inside an epoch its samples are used within some steps of each other:

    lane     3 3 3 5 3 5 5 5 1 5 1 1        samples, by segment, in the epoch's order
    needs    3: steps 0 to 2    5: steps 1 to 4    1: steps 4 to 5        (two samples a step)
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from loaders.order import Order, Segment


class Need(NamedTuple):
    """A segment, and the first and the last step of the epoch that use it."""

    segment: Segment
    first: int
    last: int


def lanes_of(order: Order, *, batch: int, rank: int, world: int) -> list[int]:
    """The lanes that a rank ever reads, with global batches of this size."""
    lanes = order.config.lanes
    found: set[int] = set()
    # Which lanes a batch's positions fall into repeats after `lanes` batches at the latest.
    for step in range(lanes):
        by_lane = np.sort(np.arange(step * batch, (step + 1) * batch) % lanes)
        found.update(by_lane[rank * (batch // world) : (rank + 1) * (batch // world)].tolist())
        if batch % lanes == 0:
            break
    return sorted(found)


def needs(order: Order, epoch: int, lanes: Iterable[int], *, batch: int) -> list[Need]:
    """What the lanes need in an epoch, what is needed first first. Steps are of global batches."""
    found = []
    for lane in lanes:
        segments = order.segments(lane)
        if not segments:
            continue
        # A lane's segments do not overlap, so a sample's number says which one it is in.
        starts = np.array([order.number(segment.shard, segment.first) for segment in segments])
        by_start = np.argsort(starts)
        numbers = order.lane(epoch, lane)
        place = by_start[np.searchsorted(starts[by_start], numbers, "right") - 1]
        present, first = np.unique(place, return_index=True)
        last = len(place) - 1 - np.unique(place[::-1], return_index=True)[1]
        for at, one, other in zip(present.tolist(), first.tolist(), last.tolist(), strict=True):
            steps = ((i * order.config.lanes + lane) // batch for i in (one, other))
            found.append(Need(segments[at], *steps))
    return sorted(found, key=lambda need: (need.first, need.last, need.segment))


def most_open(found: list[Need], bytes_of: dict[Segment, int]) -> int:
    """The most bytes that are needed at the same step."""
    changes: dict[int, int] = {}
    for need in found:
        size = bytes_of[need.segment]
        changes[need.first] = changes.get(need.first, 0) + size
        changes[need.last + 1] = changes.get(need.last + 1, 0) - size
    most = now = 0
    for step in sorted(changes):
        now += changes[step]
        most = max(most, now)
    return most


class Demand(Protocol):
    """What a rank will read, from the batch of any tag on."""

    segments: list[Segment]

    def upcoming(self, tag: int) -> Iterator[Segment]:
        """Segments in the order in which they are needed from here on, each once."""
        ...

    def most_open(self, bytes_of: dict[Segment, int]) -> int:
        """The most bytes that are needed at the same time."""
        ...


class TrainingDemand:
    """Of a rank in training; tags count its batches over all epochs."""

    def __init__(
        self,
        order: Order,
        *,
        batch: int,
        rank: int,
        world: int,
        batches: int | None = None,
        accumulate: int = 1,
    ) -> None:
        """batch: different samples of a global batch. batches: of an epoch, if it ends early."""
        self._order, self._batch, self._accumulate = order, batch, accumulate
        self._steps = order.steps(batch) if batches is None else batches // accumulate
        self._lanes = lanes_of(order, batch=batch, rank=rank, world=world)
        self.segments = [s for lane in self._lanes for s in order.segments(lane)]
        self._epoch_of: dict[int, list[Need]] = {}

    def upcoming(self, tag: int) -> Iterator[Segment]:
        """See Demand. Those used up in this epoch come where the next epoch needs them."""
        epoch, batch = divmod(tag, self._steps * self._accumulate)
        step = batch // self._accumulate
        seen: set[Segment] = set()
        for number in (epoch, epoch + 1):
            for need in self._needs(number, epoch):
                used = need.first < self._steps and (number > epoch or need.last >= step)
                if used and need.segment not in seen:
                    seen.add(need.segment)
                    yield need.segment
        yield from (segment for segment in self.segments if segment not in seen)

    def most_open(self, bytes_of: dict[Segment, int]) -> int:
        """See Demand; in epoch 0, which is as good as any."""
        return most_open(self._needs(0, 0), bytes_of)

    def _needs(self, number: int, epoch: int) -> list[Need]:
        if number not in self._epoch_of:
            for old in [old for old in self._epoch_of if old < epoch]:
                del self._epoch_of[old]
            self._epoch_of[number] = needs(self._order, number, self._lanes, batch=self._batch)
        return self._epoch_of[number]


class ValidationDemand:
    """Of a rank in validation: its part of the samples, from one end to the other."""

    def __init__(self, counts: Sequence[int], *, first: int, last: int, batch: int) -> None:
        """Samples first..last-1; the tags of batches are sample number // batch."""
        self._batch = batch
        self.segments = []
        self._ends = []
        start = 0
        for shard, samples in enumerate(counts):
            begin, end = max(first, start), min(last, start + samples)
            if begin < end:
                self.segments.append(Segment(shard, begin - start, end - start, shard))
                self._ends.append(end)
            start += samples

    def upcoming(self, tag: int) -> Iterator[Segment]:
        """See Demand. After the last the first ones are needed again."""
        at = bisect_right(self._ends, tag * self._batch)
        yield from self.segments[at:]
        yield from self.segments[:at]

    def most_open(self, bytes_of: dict[Segment, int]) -> int:
        """See Demand: a batch may stand in two shards."""
        return 2 * max((bytes_of[segment] for segment in self.segments), default=0)
