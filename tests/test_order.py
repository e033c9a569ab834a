"""Order: exactly once, the same on every topology, from any position on."""

import tracemalloc
from itertools import chain

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.order import Lanes, Order, OrderConfig
from sharding.errors import UsageError
from sharding.streams import Integers

counts_of_shards = st.lists(st.integers(1, 25), min_size=1, max_size=14)
configs = st.builds(
    OrderConfig,
    seed=st.integers(0, (1 << 64) - 1),
    lanes=st.integers(1, 40),
    window=st.integers(1, 60),
)
orders = st.builds(Order, counts_of_shards, configs)
epochs = st.integers(0, (1 << 24) - 2)
some_cases = settings(deadline=None, max_examples=80)


def batches(order: Order, epoch: int, batch: int, world: int = 1) -> list[list[int]]:
    """All global batches of an epoch, each the parts of its ranks one after the other."""
    lanes = [Lanes(order) for _ in range(world)]
    return [
        [
            number
            for rank in range(world)
            for number in order.part(
                epoch=epoch, step=step, batch=batch, rank=rank, world=world, lanes=lanes[rank]
            ).tolist()
        ]
        for step in range(order.samples // batch)
    ]


@some_cases
@given(orders, epochs, st.integers(1, 50))
def test_exactly_once(order: Order, epoch: int, batch: int) -> None:
    """Lanes hold every sample once; batch s takes positions sB to (s+1)B of the lanes in turn."""
    lanes = [order.lane(epoch, lane).tolist() for lane in range(order.config.lanes)]
    line = [lanes[g % len(lanes)][g // len(lanes)] for g in range(order.samples)]
    assert sorted(line) == list(range(order.samples)) == sorted(chain.from_iterable(lanes))
    found = batches(order, epoch, batch)
    assert len(found) == order.samples // batch
    for step, numbers in enumerate(found):
        assert sorted(numbers) == sorted(line[step * batch : (step + 1) * batch])


@some_cases
@given(counts_of_shards, configs)
def test_segments_partition_the_shards(counts: list[int], config: OrderConfig) -> None:
    """Segments cover each shard once, lanes are even, no two segments share a stream."""
    order = Order(counts, config)
    lanes = [order.segments(lane) for lane in range(config.lanes)]
    sizes = [sum(last - first for _, first, last, _ in lane) for lane in lanes]
    assert max(sizes) - min(sizes) <= 1
    segments = [*chain.from_iterable(lanes)]
    rows = [(shard, row) for shard, first, last, _ in segments for row in range(first, last)]
    every = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert sorted(rows) == every == [order.place(number) for number in range(order.samples)]
    assert len(segments) <= len(counts) + config.lanes - 1
    assert len({segment.item for segment in segments}) == len(segments)


@some_cases
@given(orders, epochs, st.integers(1, 4), st.sampled_from([1, 2, 6, 12]))
def test_world_size_changes_nothing(order: Order, epoch: int, each: int, most: int) -> None:
    """Ranks' parts one after the other are the batch of a single rank, for every world."""
    batch = each * most
    whole = batches(order, epoch, batch)
    for world in (w for w in range(2, batch + 1) if batch % w == 0):
        assert batches(order, epoch, batch, world) == whole


@some_cases
@given(counts_of_shards, configs, epochs, st.integers(1, 30))
def test_start_without_replay(
    counts: list[int], config: OrderConfig, epoch: int, batch: int
) -> None:
    """Each step computed alone, by a fresh object, is the step of a run through two epochs."""
    order = Order(counts, config)
    lanes = Lanes(order)
    for at in (epoch, epoch + 1):
        for step in range(order.samples // batch):
            run = order.part(epoch=at, step=step, batch=batch, rank=0, world=1, lanes=lanes)
            fresh = Order(counts, config)
            alone = fresh.part(epoch=at, step=step, batch=batch, rank=0, world=1)
            assert alone.tolist() == run.tolist()


@some_cases
@given(counts_of_shards, configs, epochs)
def test_jitter_is_bounded(counts: list[int], config: OrderConfig, epoch: int) -> None:
    """A sample stands less than `window` places from where its lane's segments put it."""
    order = Order(counts, config)
    still = Order(counts, OrderConfig(seed=config.seed, lanes=config.lanes, window=1))
    for lane in range(config.lanes):
        places = {number: i for i, number in enumerate(still.lane(epoch, lane).tolist())}
        moved = [abs(i - places[n]) for i, n in enumerate(order.lane(epoch, lane).tolist())]
        assert max(moved, default=0) < config.window


def test_two_shards_are_open() -> None:
    """With segments longer than the window, a lane needs two shards at a time at most, mixed."""
    order = Order([200] * 20, OrderConfig(lanes=2, window=64))
    for lane in range(2):
        shards = np.array([order.place(n)[0] for n in order.lane(5, lane).tolist()])
        spans = [np.flatnonzero(shards == shard)[[0, -1]] for shard in np.unique(shards)]
        opened = [sum(first <= at <= last for first, last in spans) for at in range(len(shards))]
        assert max(opened) == 2
        assert np.count_nonzero(np.diff(shards)) > 2 * len(spans)


class Recording(Order):
    """Remembers which lanes were computed."""

    def __init__(self, counts: list[int], config: OrderConfig) -> None:
        super().__init__(counts, config)
        self.computed: list[tuple[int, int]] = []

    def lane(self, epoch: int, lane: int) -> Integers:
        """See Order."""
        self.computed.append((epoch, lane))
        return super().lane(epoch, lane)


@pytest.mark.parametrize(("lanes", "world", "batch"), [(8, 2, 8), (8, 4, 24), (6, 6, 12)])
def test_a_rank_computes_its_own_lanes(lanes: int, world: int, batch: int) -> None:
    """Where lanes divide the batch and ranks the lanes, a rank computes its L / W lanes, once."""
    share = lanes // world
    for rank in range(world):
        order = Recording([50, 7, 30, 1, 64], OrderConfig(lanes=lanes))
        kept = Lanes(order)
        for epoch in (0, 1):
            for step in range(order.steps(batch)):
                order.part(epoch=epoch, step=step, batch=batch, rank=rank, world=world, lanes=kept)
        mine = range(rank * share, (rank + 1) * share)
        assert sorted(order.computed) == [(epoch, lane) for epoch in (0, 1) for lane in mine]


def test_epochs_and_seeds_differ() -> None:
    """Each epoch and each seed has its own order, and leaves out other samples."""
    counts = [40, 60, 25]
    orders = [Order(counts, OrderConfig(seed=seed, lanes=4, window=8)) for seed in (0, 1, 1 << 63)]
    found = [
        tuple(chain.from_iterable(batches(order, epoch, 10)))
        for order in orders
        for epoch in (0, 1, 1 << 20)
    ]
    assert len(set(found)) == len(found)
    assert len({frozenset(epoch) for epoch in found}) == len(found)


@pytest.mark.parametrize(
    ("counts", "config", "batch", "expected"),
    [
        ([1], OrderConfig(), 1, "743df94ee4c78a2a"),
        ([5, 1, 9], OrderConfig(seed=7, lanes=4, window=2), 4, "e973824ae5bcc2d7"),
        ([700, 900, 300, 1100], OrderConfig(seed=(1 << 64) - 1), 96, "fba2fc6e54cce785"),
    ],
)
def test_order_is_pinned(counts: list[int], config: OrderConfig, batch: int, expected: str) -> None:
    """Three epochs hash to what they always did; another value needs another ORDER_VERSION."""
    order = Order(counts, config)
    run = np.array([batches(order, epoch, batch) for epoch in range(3)], "<i8")
    assert xxhash.xxh3_64_hexdigest(run.tobytes()) == expected


def test_a_lane_of_a_billion_samples() -> None:
    """A lane of 1,024 over 10^9 samples in 10^6 shards takes a small part of the epoch's 8 GB."""
    counts = np.full(10**6, 1000).tolist()
    tracemalloc.start()
    try:
        lane = Order(counts, OrderConfig(lanes=1024)).lane(3, 1023)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(lane) == 10**9 // 1024
    assert peak < 100e6


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("seed", (-1, 1 << 64), r"seed must be in 0\.\.2\^64-1"),
        ("lanes", (0, (1 << 20) + 1), r"lanes must be in 1\.\.2\^20"),
        ("window", (0, (1 << 24) + 1), r"window must be in 1\.\.2\^24"),
    ],
)
def test_config_is_checked(name: str, values: tuple[int, ...], rule: str) -> None:
    """Values behind both ends of a range are refused with the rule and the value."""
    for value in values:
        with pytest.raises(ValueError, match=f"{rule}, got {value}"):
            OrderConfig(**{name: value})


def test_what_is_not_there_is_refused() -> None:
    """A part, a step or an epoch that does not exist is refused, not wrapped around."""
    order = Order([5, 4], OrderConfig())
    for rank, world in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"rank {rank} of {world} has no equal part"):
            order.part(epoch=0, step=0, batch=4, rank=rank, world=world)
    for step in (-1, 2):
        with pytest.raises(ValueError, match=rf"step {step} is not in 0\.\.1"):
            order.part(epoch=0, step=step, batch=4, rank=0, world=1)
    with pytest.raises(UsageError, match="9 samples are fewer than one global batch of 10"):
        order.steps(10)
