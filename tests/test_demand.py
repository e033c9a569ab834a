"""Demand: the segments that a rank needs, checked against a walk through the order itself."""

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.demand import TrainingDemand, ValidationDemand, lanes_of, most_open, needs
from loaders.order import Order, OrderConfig, Segment

ORDERS = st.builds(
    lambda counts, lanes, window, seed: Order(
        counts, OrderConfig(seed=seed, lanes=lanes, window=window)
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 7),
    st.integers(1, 30),
    st.integers(0, 5),
)
TOPOLOGY = st.integers(1, 3).flatmap(
    lambda world: st.tuples(
        st.integers(1, 6).map(lambda n: n * world), st.integers(0, world - 1), st.just(world)
    )
)


def walk(order: Order, epoch: int, batch: int, rank: int, world: int) -> list[set[Segment]]:
    """The segments that each step of the rank uses, sample by sample."""
    by_place = [
        (segment, lane) for lane in range(order.config.lanes) for segment in order.segments(lane)
    ]
    steps = []
    for step in range(order.samples // batch):
        used = set()
        for number in order.part(epoch=epoch, step=step, batch=batch, rank=rank, world=world):
            shard, row = order.place(int(number))
            (found,) = [s for s, _ in by_place if s.shard == shard and s.first <= row < s.last]
            used.add(found)
        steps.append(used)
    return steps


@settings(max_examples=60, deadline=None)
@given(ORDERS, TOPOLOGY, st.integers(0, 2))
def test_needs_cover_the_walk(order: Order, topology: tuple[int, int, int], epoch: int) -> None:
    """Each step's segments are among the rank's needs at that step; for one rank exactly."""
    batch, rank, world = topology
    mine = lanes_of(order, batch=batch, rank=rank, world=world)
    found = needs(order, epoch, mine, batch=batch)
    assert [need.first for need in found] == sorted(need.first for need in found)
    for step, used in enumerate(walk(order, epoch, batch, rank, world)):
        assert used <= {n.segment for n in found if n.first <= step <= n.last}
    if world == 1:
        steps = walk(order, epoch, batch, 0, 1)
        for need in found:
            whole = [step for step, used in enumerate(steps) if need.segment in used]
            if need.last < len(steps):
                assert (whole[0], whole[-1]) == (need.first, need.last)


@settings(max_examples=60, deadline=None)
@given(ORDERS, TOPOLOGY)
def test_lanes_of_are_those_that_are_read(order: Order, topology: tuple[int, int, int]) -> None:
    """No lane is read that is not named; with enough steps none is named that is not read."""
    batch, rank, world = topology
    lanes = order.config.lanes
    read = set()
    for step in range(3 * lanes):
        by_lane = np.sort(np.arange(step * batch, (step + 1) * batch) % lanes)
        read.update(by_lane[rank * batch // world : (rank + 1) * batch // world].tolist())
    assert set(lanes_of(order, batch=batch, rank=rank, world=world)) == read


@settings(max_examples=60, deadline=None)
@given(ORDERS, st.integers(0, 2), st.data())
def test_upcoming(order: Order, epoch: int, data: st.DataObject) -> None:
    """Every segment once; what is used from this step on comes first, in the order of its use."""
    batch = data.draw(st.integers(1, order.samples))
    steps = walk(order, epoch, batch, 0, 1)
    step = data.draw(st.integers(0, len(steps)))
    lanes = list(range(order.config.lanes))
    step = min(step, len(steps) - 1)
    demand = TrainingDemand(order, batch=batch, rank=0, world=1)
    found = list(demand.upcoming(epoch * len(steps) + step))
    assert sorted(found) == sorted(s for lane in lanes for s in order.segments(lane))
    first: dict[Segment, int] = {}
    for at, used in enumerate(steps[step:]):
        for segment in used:
            first.setdefault(segment, at)
    still_used = [
        n.segment
        for n in needs(order, epoch, lanes, batch=batch)
        if n.first < len(steps) and n.last >= step
    ]
    assert set(first) <= set(still_used)
    assert list(islice(found, len(still_used))) == still_used


def test_most_open() -> None:
    """The peak of what is needed together, not the sum of all."""
    order = Order([10] * 6, OrderConfig(lanes=1, window=1))
    found = needs(order, 0, [0], batch=10)
    assert most_open(found, {need.segment: 7 for need in found}) == 7
    mixed = needs(Order([10] * 6, OrderConfig(lanes=1, window=60)), 0, [0], batch=10)
    assert most_open(mixed, {need.segment: 7 for need in mixed}) > 14


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.data())
def test_validation_demand(counts: list[int], batch: int, data: st.DataObject) -> None:
    """Each sample of the part is in one segment; from a batch on, its own segment comes first."""
    samples = sum(counts)
    first = batch * data.draw(st.integers(0, (samples - 1) // batch))
    last = data.draw(st.integers(first + 1, samples))
    demand = ValidationDemand(counts, first=first, last=last, batch=batch)
    starts = [sum(counts[:shard]) for shard in range(len(counts))]
    covered = [starts[s.shard] + row for s in demand.segments for row in range(s.first, s.last)]
    assert covered == list(range(first, last))
    tag = data.draw(st.integers(first // batch, (last - 1) // batch))
    following = list(demand.upcoming(tag))
    assert sorted(following) == demand.segments
    start = starts[following[0].shard]
    assert start + following[0].first <= tag * batch < start + following[0].last
