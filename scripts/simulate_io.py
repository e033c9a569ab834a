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
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from loaders.order import Order, OrderConfig
from scripts.simulate_nodes import (
    Cluster,
    cache_misses,
    open_at_worst,
    positions,
    ranks_of_positions,
    sample_edges,
    segment_edges,
    shard_opens,
    uses_of,
)
from sharding.console import byte_size, natural, positive
from sharding.dataset import open_splits
from sharding.errors import UsageError, reports_errors
from sharding.manifest import Manifest

EXAMPLES = """examples:
  python scripts/simulate_io.py /data/imagenet-shards --nodes 4 --ranks_per_node 8 \\
      --global_batch 1024 --cache 50GB --images_per_s 2500
  python scripts/simulate_io.py --synthetic 1281167x1120 --nodes 4 --tier 250 --tib 2.4
"""
BINS = 20
TIERS = (125, 250, 500, 1000)
_SHOWN_NODES = 16


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
            uses_of(segment_of[epoch][mine], step_of[mine] + epoch * steps)
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
