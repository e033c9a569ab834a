#!/usr/bin/env python3
"""Plan a cluster's storage before it is paid for: what each node reads, when, and what holds it.

Nothing is read but a manifest. The order of the samples is the real one; within a shard all samples
are taken to be of the same size. A node fetches whole segments (a lane's part of a shard) into its
cache when their first sample is due, and keeps them until it needs the room; what is needed last
goes first. A segment that finds no room beside those that are open is read by range, sample by
sample, as everything is with a cache of 0. What is fetched ahead of its time needs more room.

FSx for Lustre is a model, not a measurement: T = max(round trips / readers, metadata operations /
IOPS, bytes / bandwidth). Tiers (MB/s of disk for each TiB of PERSISTENT_2, 125 to 1,000) and
metadata IOPS (1,500 to 192,000, as provisioned) are those of AWS's FSx for Lustre User Guide. An
open counts as one metadata operation; each worker of a rank opens tar and index of every shard that
the rank reads; every call is a round trip, and a worker makes one at a time.
"""

import argparse
import heapq
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from loaders.order import Order, OrderConfig
from sharding.console import byte_size, natural, positive
from sharding.dataset import open_splits
from sharding.errors import UsageError, reports_errors
from sharding.manifest import Manifest
from sharding.streams import Integers

EXAMPLES = """examples:
  python scripts/simulate_io.py /data/imagenet-shards --nodes 4 --ranks_per_node 8 \\
      --global_batch 1024 --cache 50GB --images_per_s 2500
  python scripts/simulate_io.py --synthetic 1281167x1120 --nodes 4 --tier 250 --tib 2.4
"""
BINS = 20
TIERS = (125, 250, 500, 1000)
_SHOWN_NODES = 16
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Lustre:
    """A file system of FSx, and what a call of it takes."""

    tier: int = 125
    """MB/s for each TiB."""
    tib: float = 4.8
    metadata_iops: int = 1500
    open_ms: float = 1.0
    read_ms: float = 1.0
    workers: int = 8
    """Loader processes of each rank, each with one call at a time."""

    def __post_init__(self) -> None:
        if not (self.tib > 0 and self.open_ms >= 0 and self.read_ms >= 0):
            raise UsageError(
                f"TiB must be more than 0 and milliseconds at least 0, got {self.tib}, "
                f"{self.open_ms} and {self.read_ms}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlan:
    """What one node reads and holds."""

    segments: int
    """That it reads of, in any epoch."""
    share_bytes: int
    """Their bytes: a cache that holds them reads nothing in the second epoch."""
    open_segments: int
    """Begun and not yet finished, at the worst step."""
    open_bytes: int
    """Theirs, at the worst step: the cache that the window needs."""
    epoch_bytes: tuple[int, ...]
    """Read in each epoch."""
    demand: tuple[tuple[float, ...], ...]
    """For each epoch: MB/s in BINS parts of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds that an epoch takes at least, by what limits it."""

    opens: int
    """In an epoch, over all nodes."""
    opens_per_s: float
    """Needed for training not to wait."""
    round_trips: float
    metadata: float
    bandwidth: float

    @property
    def slowest(self) -> tuple[str, float]:
        """What limits, and its seconds."""
        names = ("round_trips", "metadata", "bandwidth")
        return max(((name, getattr(self, name)) for name in names), key=lambda limit: limit[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that is found out."""

    samples: int
    shards: int
    total_bytes: int
    segments: int
    steps: int
    epoch_s: float
    """That training takes."""
    nodes: tuple[NodePlan, ...]
    shares: tuple[float, ...]
    """For each epoch: bytes that all nodes read / bytes of the data set."""
    imagefolder: Limits
    packed: Limits


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


def simulate(
    counts: Sequence[int],
    sizes: Sequence[int],
    config: OrderConfig,
    cluster: Cluster,
    lustre: Lustre,
    *,
    epochs: int = 3,
) -> Plan:
    """PURE: plan the reading of shards with so many samples and bytes. `epochs` are looked at.

    Raises UsageError if there is not one global batch.
    """
    order = Order(counts, config)
    steps = order.steps(cluster.global_batch)
    edges = sample_edges(counts, sizes)
    starts, ends = segment_edges(order, counts)
    segment_bytes = (edges[ends] - edges[starts]).tolist()
    rank_of = ranks_of_positions(order, cluster)
    numbers = [positions(order, epoch)[: len(rank_of)] for epoch in range(epochs + 1)]
    segment_of = [np.searchsorted(starts, each, "right") - 1 for each in numbers]
    step_of = np.arange(len(rank_of)) // cluster.global_batch
    bin_s = steps * cluster.global_batch / (cluster.images_per_s * cluster.world * BINS)
    nodes = []
    for node in range(cluster.nodes):
        mine = np.flatnonzero(rank_of // cluster.ranks_per_node == node)
        uses = [
            _uses(segment_of[epoch][mine], step_of[mine] + epoch * steps)
            for epoch in range(epochs + 1)
        ]
        read = np.zeros((epochs, BINS), np.int64)
        for epoch, misses in enumerate(cache_misses(uses, segment_bytes, cluster.cache_bytes)):
            whole = np.isin(uses[epoch].segments, misses.fetched)
            first = uses[epoch].first[whole] - epoch * steps
            what = np.array(segment_bytes, np.int64)[uses[epoch].segments[whole]]
            np.add.at(read[epoch], first * BINS // steps, what)
            single = mine[np.isin(segment_of[epoch][mine], misses.ranged)]
            what = edges[numbers[epoch][single] + 1] - edges[numbers[epoch][single]]
            np.add.at(read[epoch], step_of[single] * BINS // steps, what)
        opened = [open_at_worst(each, segment_bytes) for each in uses[:epochs]]
        touched = np.unique(np.concatenate([each.segments for each in uses[:epochs]])).tolist()
        nodes.append(
            NodePlan(
                segments=len(touched),
                share_bytes=sum(segment_bytes[segment] for segment in touched),
                open_segments=max(worst[0] for worst in opened),
                open_bytes=max(worst[1] for worst in opened),
                epoch_bytes=tuple(read.sum(axis=1).tolist()),
                demand=tuple(map(tuple, (read / bin_s / 1e6).tolist())),
            )
        )
    total, epoch_s = int(edges[-1]), BINS * bin_s
    shares = tuple(sum(node.epoch_bytes[e] for node in nodes) / total for e in range(epochs))
    shard_starts = np.cumsum([0, *counts])[:-1]
    shard_of = np.searchsorted(shard_starts, numbers[0], "right") - 1
    opens = shard_opens(rank_of, shard_of, lustre.workers)
    reads = len(rank_of)
    return Plan(
        samples=order.samples,
        shards=len(counts),
        total_bytes=total,
        segments=len(starts),
        steps=steps,
        epoch_s=epoch_s,
        nodes=tuple(nodes),
        shares=shares,
        imagefolder=limits(
            opens=reads, reads=reads, size=total, epoch_s=epoch_s, lustre=lustre, cluster=cluster
        ),
        packed=limits(
            opens=opens,
            reads=reads,
            size=sum(node.epoch_bytes[0] for node in nodes),
            epoch_s=epoch_s,
            lustre=lustre,
            cluster=cluster,
        ),
    )


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


def _uses(segments: Integers, steps: Integers) -> Uses:
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


def limits(
    *, opens: int, reads: int, size: int, epoch_s: float, lustre: Lustre, cluster: Cluster
) -> Limits:
    """The model of the docstring above, for an epoch of so many opens, reads and bytes."""
    calls_s = (opens * lustre.open_ms + reads * lustre.read_ms) / 1e3
    return Limits(
        opens=opens,
        opens_per_s=opens / epoch_s,
        round_trips=calls_s / (cluster.world * lustre.workers),
        metadata=opens / lustre.metadata_iops,
        bandwidth=size / (lustre.tier * lustre.tib * 1e6),
    )


def report(plan: Plan, cluster: Cluster, lustre: Lustre) -> str:
    """The plan for people."""
    return "\n\n".join([_table(plan, cluster), _timeline(plan), _model(plan, lustre)])


def _table(plan: Plan, cluster: Cluster) -> str:
    head = ("node", "epoch 0", "epoch 1", "segments", "open", "GB open", "GB in all")
    rows = [
        f"{number:10}{node.epoch_bytes[0] / 1e9:10,.2f}{node.epoch_bytes[1] / 1e9:10,.2f}"
        f"{node.segments:10,}{node.open_segments:10,}{node.open_bytes / 1e9:10,.2f}"
        f"{node.share_bytes / 1e9:10,.2f}"
        for number, node in enumerate(plan.nodes)
    ]
    if len(rows) > _SHOWN_NODES:
        rows[_SHOWN_NODES:] = [f"{'...':>10}   --json has all {len(rows)}"]
    window = max(node.open_bytes for node in plan.nodes) / 1e9
    share = max(node.share_bytes for node in plan.nodes) / 1e9
    return f"""\
{plan.samples:,} samples in {plan.shards:,} shards, {plan.total_bytes / 1e9:,.1f} GB, \
{plan.segments:,} segments
{cluster.nodes} nodes x {cluster.ranks_per_node} ranks x {cluster.images_per_s:,g} images/s: \
{plan.steps:,} steps of {cluster.global_batch:,} in {plan.epoch_s:,.0f} s, if training never waits

GB that a node reads, with a cache of {cluster.cache_bytes / 1e9:,.1f} GB, and what it holds
{"".join(f"{title:>10}" for title in head)}
{chr(10).join(rows)}
all nodes read {plan.shares[0]:.3f} x the data set in epoch 0, {plan.shares[1]:.3f} x in epoch 1
a node's cache holds the window from {window:,.2f} GB on; from {share:,.2f} GB on the second epoch \
reads nothing"""


def _timeline(plan: Plan) -> str:
    busiest = max(plan.nodes, key=lambda node: max(map(max, node.demand)))
    lines = [f"MB/s in {BINS} parts of an epoch, of the node with the highest peak"]
    for epoch, demand in enumerate(busiest.demand[:2]):
        lines.append(f"epoch {epoch}:" + "".join(f"{rate:7,.0f}" for rate in demand))
    return "\n".join(lines)


def _model(plan: Plan, lustre: Lustre) -> str:
    head = ("opens", "opens/s", "of IOPS", "round trips", "metadata", "bandwidth", "epoch")
    rows = []
    for name, one in (("imagefolder", plan.imagefolder), ("shards", plan.packed)):
        limit, seconds = one.slowest
        because = limit.replace("_", " ") if seconds > plan.epoch_s else "training"
        rows.append(
            f"{name:13}{one.opens:12,}{one.opens_per_s:12,.1f}"
            f"{one.opens_per_s / lustre.metadata_iops:12.1%}{one.round_trips:10,.1f} s"
            f"{one.metadata:10,.1f} s{one.bandwidth:10,.1f} s{max(seconds, plan.epoch_s):10,.0f} s"
            f", limited by {because}"
        )
    return f"""\
A model of FSx for Lustre: {lustre.tier} MB/s a TiB x {lustre.tib:g} TiB, \
{lustre.metadata_iops:,} metadata IOPS, {lustre.open_ms:g} ms an open, {lustre.read_ms:g} ms a \
read, {lustre.workers} workers a rank
{" " * 13}{"".join(f"{title:>12}" for title in head)}
{chr(10).join(rows)}"""


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Plan, and print."""
    options = _options(arguments)
    if (options.data is None) == (options.synthetic is None):
        raise UsageError("give a manifest, a folder of shards or --synthetic, one of them")
    if options.data is None:
        samples, each = options.synthetic
        counts = [each] * (samples // each) + [samples % each] * (samples % each > 0)
        sizes = [count * options.sample_bytes for count in counts]
    else:
        shards = _manifest(options.data).shards
        counts = [shard.samples for shard in shards]
        sizes = [shard.bytes for shard in shards]
    cluster = Cluster(
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        global_batch=options.global_batch,
        images_per_s=options.images_per_s,
        cache_bytes=options.cache,
    )
    lustre = Lustre(
        tier=options.tier,
        tib=options.tib,
        metadata_iops=options.metadata_iops,
        open_ms=options.open_ms,
        read_ms=options.read_ms,
        workers=options.workers,
    )
    try:
        config = OrderConfig(seed=options.seed, lanes=options.lanes, window=options.window)
    except ValueError as error:
        raise UsageError(str(error)) from error
    plan = simulate(counts, sizes, config, cluster, lustre)
    if options.json:
        facts = {"order": asdict(config), "cluster": asdict(cluster), "lustre": asdict(lustre)}
        print(json.dumps(facts | {"plan": asdict(plan)}))
    else:
        print(report(plan, cluster, lustre))
    return 0


def _manifest(data: str) -> Manifest:
    """Of a manifest.json, of a packed split, or of the training split of a data set."""
    if data.endswith(".json"):
        try:
            text = Path(data).read_bytes()
        except FileNotFoundError as error:
            raise UsageError(f"{data} is not there; give a manifest.json or its folder") from error
        return Manifest.from_json(text, where=data)
    splits = open_splits(data)
    return (splits.get("train") or next(iter(splits.values()))).manifest


def _synthetic(text: str) -> tuple[int, int]:
    """'1281167x1120' -> samples, samples a shard."""
    samples, _, each = text.partition("x")
    if not (samples.isdecimal() and each.isdecimal() and 0 < int(each) <= int(samples)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no data set; write SAMPLESxSAMPLES_A_SHARD, for example 1281167x1120"
        )
    return int(samples), int(each)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cluster, lustre, order = Cluster(), Lustre(), OrderConfig()
    add = parser.add_argument
    add("data", nargs="?", metavar="MANIFEST_OR_FOLDER", help="manifest.json, or packed data")
    add("--synthetic", type=_synthetic, metavar="NxM", help="N samples, M a shard, without shards")
    add(
        "--sample_bytes",
        type=byte_size,
        default=114_739,
        metavar="SIZE",
        help="with --synthetic (default %(default)s, ImageNet's 147 GB / 1,281,167)",
    )
    add("--nodes", type=positive, default=cluster.nodes, metavar="N", help="default 1")
    add("--ranks_per_node", type=positive, default=cluster.ranks_per_node, metavar="R", help="8")
    add("--global_batch", type=positive, default=cluster.global_batch, metavar="B", help="1024")
    add("--images_per_s", type=float, default=1000.0, metavar="X", help="of each rank (1000)")
    add("--cache", type=byte_size, default=0, metavar="SIZE", help="of each node (default 0)")
    add("--seed", type=natural, default=order.seed, help="of the run (default 0)")
    add("--lanes", type=positive, default=order.lanes, metavar="L", help="default %(default)s")
    add("--window", type=positive, default=order.window, metavar="W", help="default %(default)s")
    add("--tier", type=int, choices=TIERS, default=lustre.tier, help="MB/s a TiB (125)")
    add("--tib", type=float, default=lustre.tib, metavar="TIB", help="default %(default)s")
    add("--metadata_iops", type=positive, default=lustre.metadata_iops, metavar="N", help="1500")
    add("--open_ms", type=float, default=lustre.open_ms, metavar="MS", help="default 1")
    add("--read_ms", type=float, default=lustre.read_ms, metavar="MS", help="default 1")
    add("--workers", type=positive, default=lustre.workers, metavar="K", help="of each rank (8)")
    add("--json", action="store_true", help="print all as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
