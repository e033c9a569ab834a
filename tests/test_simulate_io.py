"""simulate_io: the plan against a walk over the real order, sample by sample."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loaders.order import Order, OrderConfig
from scripts import simulate_io
from scripts.simulate_io import BINS, Lustre, simulate
from scripts.simulate_nodes import Cluster, Misses, shard_opens
from sharding.errors import UsageError

some_cases = settings(deadline=None, max_examples=60)
EPOCHS = 3


class Walk:
    """The same questions, answered by Order.part for each step and rank."""

    def __init__(
        self, counts: list[int], sizes: list[int], config: OrderConfig, cluster: Cluster
    ) -> None:
        order = Order(counts, config)
        self.steps = order.steps(cluster.global_batch)
        self.sample_bytes = [
            size * (row + 1) // count - size * row // count
            for count, size in zip(counts, sizes, strict=True)
            for row in range(count)
        ]
        starts = np.cumsum([0, *counts])
        self.segment_of: dict[int, int] = {}
        segments = sorted(
            (int(starts[s.shard]) + s.first, int(starts[s.shard]) + s.last)
            for lane in range(config.lanes)
            for s in order.segments(lane)
        )
        for segment, (first, last) in enumerate(segments):
            self.segment_of |= dict.fromkeys(range(first, last), segment)
        self.segment_bytes = [sum(self.sample_bytes[first:last]) for first, last in segments]
        self.uses: list[list[list[tuple[int, int]]]] = []  # node, epoch -> (step, number)
        for node in range(cluster.nodes):
            ranks = range(node * cluster.ranks_per_node, (node + 1) * cluster.ranks_per_node)
            self.uses.append(
                [
                    [
                        (step, number)
                        for step in range(self.steps)
                        for rank in ranks
                        for number in order.part(
                            epoch=epoch,
                            step=step,
                            batch=cluster.global_batch,
                            rank=rank,
                            world=cluster.world,
                        ).tolist()
                    ]
                    for epoch in range(EPOCHS + 1)
                ]
            )

    def spans(self, node: int, epoch: int) -> dict[int, tuple[int, int]]:
        """First and last step of each segment."""
        steps = defaultdict(list)
        for step, number in self.uses[node][epoch]:
            steps[self.segment_of[number]].append(step)
        return {segment: (min(each), max(each)) for segment, each in steps.items()}

    def misses(self, node: int, capacity: int) -> list[Misses]:
        """The cache's rule, carried out step by step without any heap."""
        held: set[int] = set()
        found = []
        for epoch in range(EPOCHS):
            spans, again = self.spans(node, epoch), self.spans(node, epoch + 1)
            misses = Misses([], [])

            def next_use(
                segment: int,
                step: int,
                spans: dict[int, tuple[int, int]] = spans,
                again: dict[int, tuple[int, int]] = again,
            ) -> int:
                if segment in spans and spans[segment][0] > step:
                    return spans[segment][0]
                return self.steps + again[segment][0] if segment in again else 1 << 40

            for step in range(self.steps):
                due = sorted(s for s, (first, _) in spans.items() if first == step)
                in_use = {s for s in held if s in spans and spans[s][0] <= step <= spans[s][1]}
                for segment in due:
                    if segment in held:
                        continue
                    size = self.segment_bytes[segment]
                    idle = sorted(held - in_use, key=lambda s: (next_use(s, step), s))
                    if size + sum(self.segment_bytes[s] for s in in_use) > capacity:
                        misses.ranged.append(segment)
                        continue
                    while sum(self.segment_bytes[s] for s in held) + size > capacity:
                        held.remove(idle.pop())
                    held.add(segment)
                    in_use.add(segment)
                    misses.fetched.append(segment)
            found.append(misses)
        return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], OrderConfig, Cluster]:
    """Small data sets and clusters, the lanes dividing the batch or not."""
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    sizes = [draw(st.integers(1, 500)) for _ in counts]
    config = OrderConfig(
        seed=draw(st.integers(0, 1 << 32)),
        lanes=draw(st.integers(1, 9)),
        window=draw(st.integers(1, 15)),
    )
    nodes, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    batch = nodes * ranks * draw(st.integers(1, 3))
    counts[0] += max(0, batch - sum(counts))
    cache = draw(st.integers(0, sum(sizes)))
    cluster = Cluster(nodes=nodes, ranks_per_node=ranks, global_batch=batch, cache_bytes=cache)
    return counts, sizes, config, cluster


@example(  # each epoch leaves out a sample, and so a segment, which the next one needs
    (
        [1] * 7 + [2],
        [1] * 7 + [3],
        OrderConfig(seed=0, lanes=1, window=1),
        Cluster(nodes=1, ranks_per_node=1, global_batch=2, cache_bytes=9),
    )
)
@some_cases
@given(cases())
def test_the_plan_is_what_a_walk_over_the_order_finds(
    case: tuple[list[int], list[int], OrderConfig, Cluster],
) -> None:
    """Bytes of each epoch, what is open at a time, each node's share, and when it is read."""
    counts, sizes, config, cluster = case
    plan = simulate(counts, sizes, config, cluster, Lustre(), epochs=EPOCHS)
    walk = Walk(counts, sizes, config, cluster)
    assert (plan.steps, plan.total_bytes) == (walk.steps, sum(sizes))
    part_s = plan.epoch_s / BINS
    for node, found in enumerate(plan.nodes):
        touched = {walk.segment_of[n] for each in walk.uses[node][:EPOCHS] for _, n in each}
        assert found.segments == len(touched)
        assert found.share_bytes == sum(walk.segment_bytes[s] for s in touched)
        worst = []
        for epoch, misses in enumerate(walk.misses(node, cluster.cache_bytes)):
            spans = walk.spans(node, epoch)
            for step in range(walk.steps):
                now = [s for s, (first, last) in spans.items() if first <= step <= last]
                worst.append((len(now), sum(walk.segment_bytes[s] for s in now)))
            parts = [0] * BINS
            for segment in misses.fetched:
                parts[spans[segment][0] * BINS // walk.steps] += walk.segment_bytes[segment]
            for step, number in walk.uses[node][epoch]:
                if walk.segment_of[number] in misses.ranged:
                    parts[step * BINS // walk.steps] += walk.sample_bytes[number]
            assert found.epoch_bytes[epoch] == sum(parts)
            assert found.demand[epoch] == pytest.approx([p / part_s / 1e6 for p in parts])
        assert found.open_segments == max(count for count, _ in worst)
        assert found.open_bytes == max(size for _, size in worst)
    read = sum(node.epoch_bytes[0] for node in plan.nodes)
    assert plan.shares[0] == read / sum(sizes)


@some_cases
@given(cases())
def test_caches_of_the_sizes_that_are_named_do_what_is_said_of_them(
    case: tuple[list[int], list[int], OrderConfig, Cluster],
) -> None:
    """Without one each sample is read once; one of the share reads each segment once in all."""
    counts, sizes, config, cluster = case

    def with_cache(size: int) -> simulate_io.Plan:
        other = Cluster(
            nodes=cluster.nodes,
            ranks_per_node=cluster.ranks_per_node,
            global_batch=cluster.global_batch,
            cache_bytes=size,
        )
        return simulate(counts, sizes, config, other, Lustre())

    without = with_cache(0)
    whole = sum(counts) % cluster.global_batch == 0
    for share in without.shares:
        assert share == 1 if whole else share <= 1
    share = max(node.share_bytes for node in without.nodes)
    for node in with_cache(share).nodes:
        assert sum(node.epoch_bytes) == node.share_bytes
        if whole and cluster.nodes == 1:
            assert node.epoch_bytes[1:] == (0, 0)


def test_each_node_reads_only_its_own_shards() -> None:
    """4 nodes, 32 lanes: together they read the data set once, and then a cache holds it."""
    counts, sizes = [1120] * 40, [128_000_000] * 40
    cluster = Cluster(nodes=4, ranks_per_node=2, global_batch=512, cache_bytes=1_600_000_000)
    plan = simulate(counts, sizes, OrderConfig(), cluster, Lustre())
    assert 1 <= plan.shares[0] <= 1.001
    assert plan.shares[1:] == (0, 0)
    assert all(node.share_bytes < cluster.cache_bytes for node in plan.nodes)


def test_the_model_of_lustre_is_that_of_its_three_limits() -> None:
    """ImageNet on 1,500 IOPS and 4.8 TiB of 125: 854 s of metadata, 245 s of bandwidth."""
    found = simulate_io.limits(
        opens=1_281_167,
        reads=1_281_167,
        size=147_000_000_000,
        epoch_s=1000,
        lustre=Lustre(workers=4),
        cluster=Cluster(ranks_per_node=8),
    )
    assert found.metadata == pytest.approx(854, abs=0.5)
    assert found.bandwidth == pytest.approx(245, abs=0.5)
    assert found.round_trips == pytest.approx(1281.167 * 2 / 32)
    assert found.slowest == ("metadata", found.metadata)
    assert found.opens_per_s == pytest.approx(1281.167)


def test_a_worker_opens_tar_and_index_of_each_shard_of_its_rank() -> None:
    """Rank 0 reads shards 0 (5 samples) and 1 (1), rank 1 shard 1 (3): with 4 workers 2(4+1+3)."""
    rank_of = np.array([0] * 6 + [1] * 3)
    shard_of = np.array([0] * 5 + [1] * 4)
    assert shard_opens(rank_of, shard_of, 4) == 16
    assert shard_opens(rank_of, shard_of, 1) == 6


def test_manifests_folders_and_synthetic_data_are_planned(
    small_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """manifest.json, the split and the data set say the same; the report has all its parts."""
    options = ["--nodes", "2", "--ranks_per_node", "2", "--global_batch", "8", "--lanes", "4"]
    plans = []
    for data in (small_shards, small_shards / "train", small_shards / "train" / "manifest.json"):
        assert simulate_io.main([str(data), *options, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["plan"]["samples"] == 51
    assert plans[0]["plan"]["shards"] == 6
    assert (
        simulate_io.main(["--synthetic", "2500x100", "--nodes", "20", "--global_batch", "160"]) == 0
    )
    report = capsys.readouterr().out
    for part in ("2,500 samples in 25 shards", "--json has all 20", "MB/s", "a model", "metadata"):
        assert part.lower() in report.lower()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "one of them"),
        (["--synthetic", "20x5", "--global_batch", "12"], "not divisible by 1 nodes x 8 ranks"),
        (["--synthetic", "20x5", "--global_batch", "24"], "fewer than one global batch"),
        (["missing/manifest.json"], "is not there"),
        (["missing"], "holds no packed data set"),
        (["--synthetic", "2000x5", "--images_per_s", "0"], "more than 0"),
        (["--synthetic", "2000x5", "--tib", "-1"], "more than 0"),
        (["--synthetic", "2000x5", "--lanes", "9999999"], "lanes must be in"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the value, and what to do."""
    assert simulate_io.main(arguments) in {2, 3}
    assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        simulate_io.main(["--synthetic", "5x20"])
    with pytest.raises(UsageError, match="not divisible"):
        Cluster(nodes=3, global_batch=1024)
