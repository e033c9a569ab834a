"""What is in a packed split: facts from its manifest, and small histograms from its indexes.

The manifest is one file. The indexes are one for each shard, 80 KB each for ImageNet, so of a
large data set only some are read unless all are asked for.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sharding.dataset import PackedSplit, open_splits
from sharding.manifest import ImageRules
from sharding.streams import Integers

MOST_SHARDS = 64
"""Of a split, whose indexes are read where not all are asked for."""
_READS_AT_ONCE = 8
_MOST_BINS = 8
_BAR = 40  # characters of the longest bar


class Tally(NamedTuple):
    """How many samples have each value: arrays that are indexed by it."""

    shards: int
    """How many were looked at."""
    labels: Integers
    sides: Integers
    """Pixels of the shorter side; 0 is unknown."""
    kilobytes: Integers
    """Of the image's file, in 10^3 bytes, rounded up."""


class Bin(NamedTuple):
    """How many things have a value in first..last."""

    first: int
    last: int
    things: int


def main_info(options: argparse.Namespace) -> int:
    """Say what is in a data set: a column a split, then small histograms."""
    splits = list(open_splits(options.destination).values())
    said = [facts(split) for split in splits]
    if options.json:
        found = [histograms(tally(split, every=options.all), split) for split in splits]
        print(json.dumps([one | more for one, more in zip(said, found, strict=True)], indent=1))
        return 0
    names = [name for name in said[0] if name != "class_names"]
    width = max(len(name) for name in names)
    columns = [[str(fact[name]) for name in names] for fact in said]
    for row, name in enumerate(names):
        cells = "  ".join(column[row].ljust(max(map(len, column))) for column in columns)
        print(f"{name.replace('_', ' '):<{width}}  {cells}".rstrip())
    for split in splits:
        print("\n".join(charts(tally(split, every=options.all), split)))
    return 0


def facts(split: PackedSplit) -> dict[str, object]:
    """What the manifest says, under the names that `shard.py info` prints."""
    manifest = split.manifest
    samples = [shard.samples for shard in manifest.shards]
    return {
        "split": manifest.split,
        "url": split.store.url,
        "digest": manifest.digest,
        "samples": manifest.samples,
        "classes": len(manifest.classes),
        "shards": len(samples),
        "samples_a_shard": f"{min(samples)} to {max(samples)}",
        "megabytes": round(manifest.total_bytes / 1e6, 1),
        "packing_seed": manifest.packing.seed if manifest.packing else "none: shards of others",
        "images_rejected": manifest.source.rejected,
        "kinds": ", ".join(f"{n} {kind}" for kind, n in manifest.source.kinds.items()) or "unknown",
        "made_anew": _made_anew(manifest.images),
        "class_names": manifest.classes,
    }


def tally(split: PackedSplit, *, every: bool = False) -> Tally:
    """Count what the indexes say: of every shard, or of MOST_SHARDS spread over all of them.

    Raises DataError for an index that is missing or damaged.
    """
    shards = len(split.manifest.shards)
    few = shards if every else min(shards, MOST_SHARDS)
    numbers = [i * shards // few for i in range(few)]
    labels = np.zeros(len(split.manifest.classes), np.int64)
    sides = kilobytes = np.zeros(1, np.int64)
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for index in pool.map(split.read_index, numbers):
            table = index.table
            labels = _plus(labels, np.bincount(table["label"]))
            sides = _plus(sides, np.bincount(np.minimum(table["width"], table["height"])))
            kilobytes = _plus(kilobytes, np.bincount(-(-table["size"].astype(np.int64) // 1000)))
    return Tally(few, labels, sides, kilobytes)


def histogram(counts: Integers) -> list[Bin]:
    """PURE: counts by value, in at most 9 bins from the least value that occurs to the greatest.

    A range of more than eight-fold is cut by powers of two, another by steps of 1, 2 or 5 times a
    power of ten. The value 0, which stands for nothing known, is left out.
    """
    there = np.flatnonzero(counts[1:]) + 1
    if not len(there):
        return []
    edges = _edges(int(there[0]), int(there[-1]))
    return [Bin(first, end - 1, int(counts[first:end].sum())) for first, end in pairwise(edges)]


def histograms(found: Tally, split: PackedSplit) -> dict[str, object]:
    """For JSON: bins as [first, last, count]; the classes' samples only where all were counted."""
    complete = found.shards == len(split.manifest.shards)
    return {
        "shards_read": found.shards,
        "shorter_side": histogram(found.sides),
        "sides_unknown": int(found.sides[0]),
        "kilobytes": histogram(found.kilobytes),
        "class_samples": found.labels.tolist() if complete else None,
    }


def charts(found: Tally, split: PackedSplit) -> list[str]:
    """Lines for people."""
    manifest = split.manifest
    complete = found.shards == len(manifest.shards)
    part = f", {found.shards} of {len(manifest.shards)} shards (--all: every one)"
    of = "" if complete else part
    lines = ["", f"{manifest.split}: images by shorter side in pixels{of}"]
    lines += _chart(found.sides, zero="unknown")
    lines += ["", f"{manifest.split}: images by size of the file in kB{of}"]
    lines += _chart(found.kilobytes)
    if complete:
        few, many = int(found.labels.argmin()), int(found.labels.argmax())
        lines += ["", f"{manifest.split}: classes by number of images"]
        lines += _chart(np.bincount(found.labels), zero="none")
        lines.append(
            f"  fewest {found.labels[few]:,}: {manifest.classes[few]}; "
            f"most {found.labels[many]:,}: {manifest.classes[many]}"
            if found.labels[few] < found.labels[many]
            else f"  all {found.labels[few]:,}"
        )
    return lines


def _chart(counts: Integers, *, zero: str = "") -> list[str]:
    """A line for each bin; zero: what the value 0 means."""
    rows = [
        (f"{first}" if first == last else f"{first} to {last}", count)
        for first, last, count in histogram(counts)
    ]
    if zero and counts[0]:
        rows.append((zero, int(counts[0])))
    longest = max((count for _, count in rows), default=1)
    width = max((len(name) for name, _ in rows), default=0)
    return [
        f"  {name:>{width}}  {'#' * -(-_BAR * count // longest):<{_BAR}}  {count:,}"
        for name, count in rows
    ]


def _edges(low: int, high: int) -> list[int]:
    """Where the bins begin, and where the next one after the last would."""
    if high > 8 * low:
        first, factor = 1 << (low.bit_length() - 1), 2
        while first * factor**_MOST_BINS <= high:
            factor *= 2
        edges = [first]
        while edges[-1] <= high:
            edges.append(edges[-1] * factor)
        return edges
    steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    step = next(step for step in steps if high - low < _MOST_BINS * step)
    first = low // step * step
    bins = (high - first) // step + 1
    return [max(first, 1), *(first + i * step for i in range(1, bins + 1))]


def _plus(one: Integers, other: Integers) -> Integers:
    """The sum of two arrays of counts; the shorter one goes on with zeros."""
    total = np.zeros(max(len(one), len(other)), np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total


def _made_anew(rules: ImageRules) -> str:
    steps = [f"shorter side at most {rules.resize}"] if rules.resize else []
    steps += ["transcoded to JPEG"] if rules.transcode else []
    return f"{' and '.join(steps)}, quality {rules.quality}" if steps else "nothing"
