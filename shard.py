#!/usr/bin/env python3
"""Turn ImageFolder data sets into tar shards, check them, and look into them."""

import argparse
import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from loaders.order import Order, OrderConfig
from sharding.dataset import PackedSplit, open_splits
from sharding.errors import DataError, UsageError, reports_errors
from sharding.manifest import MANIFEST_NAME, Manifest, Packing, Shard
from sharding.pack import pack
from sharding.source import find_splits, scan
from sharding.store import LocalStore, open_store
from sharding.verify import verify

EXAMPLES = """examples:
  python shard.py pack /data/imagenet /data/imagenet-shards
  python shard.py verify /data/imagenet-shards
  python shard.py info /data/imagenet-shards
  python shard.py locate /data/imagenet-shards --epoch 3 --step 1200 --global_batch 1024 --world 8
"""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(text: str) -> int:
    """'256MB' -> 256000000; KB, MB, GB are powers of ten, KiB, MiB, GiB powers of two."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = match[2] if match and match[2] != "B" else ""
    if not match or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 256MB or 64MiB")
    size = float(match[1]) * _UNITS[unit]
    if size >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any file can hold")
    return int(size)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def natural(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 0")
    return int(text)


def main_pack(options: argparse.Namespace) -> int:
    """Pack every split below SRC; a validation split takes its labels from the training split."""
    try:
        packing = Packing(
            seed=options.seed, shard_bytes=options.shard_size, max_samples=options.max_samples
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not options.destination:
        raise UsageError("DST is empty; is a variable unset?")
    classes: tuple[str, ...] | None = None
    for split, folder in find_splits(options.source).items():
        if split == "val" and classes is None:
            classes = _packed_classes(options.destination)
        listing = scan(folder, classes=classes)
        classes = listing.classes
        store = open_store(f"{options.destination.rstrip('/')}/{split}")
        assert isinstance(store, LocalStore)
        with _Bar(f"pack {split}", len(listing)) as bar:
            manifest = pack(
                listing,
                store,
                split=split,
                packing=packing,
                workers=options.workers,
                progress=bar.advance,
            )
        counts = manifest.source
        print(
            f"{split}: {counts.found} images found = {counts.packed} packed + {counts.rejected} "
            f"rejected ({listing.ignored} other files ignored), {len(manifest.classes)} classes, "
            f"{len(manifest.shards)} shards, {manifest.total_bytes / 1e6:.1f} MB in {store.url}"
        )
    return 0


def main_verify(options: argparse.Namespace) -> int:
    """Re-read every byte; a line for each thing wrong, and exit status 3 if there is any."""
    problems = 0
    for name, split in open_splits(options.destination).items():
        with _Bar(f"verify {name}", split.manifest.samples) as bar:
            for number, lines in verify(split, workers=options.workers):
                for line in lines:
                    tqdm.write(line, file=sys.stderr)
                problems += len(lines)
                bar.advance(split.manifest.shards[number])
        print(
            f"{name}: {split.manifest.samples} samples in {len(split.manifest.shards)} shards, "
            f"{split.manifest.total_bytes / 1e6:.1f} MB read"
        )
    if problems:
        raise DataError(f"{options.destination}: {problems} problem(s), see above")
    print("everything is as it was packed")
    return 0


def main_info(options: argparse.Namespace) -> int:
    """Say what is in a data set."""
    facts = [
        _facts(split.manifest, split.store.url)
        for split in open_splits(options.destination).values()
    ]
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    names = [name for name in facts[0] if name != "class_names"]
    width = max(len(name) for name in names)
    columns = [[str(fact[name]) for name in names] for fact in facts]
    for row, name in enumerate(names):
        cells = "  ".join(column[row].ljust(max(map(len, column))) for column in columns)
        print(f"{name.replace('_', ' '):<{width}}  {cells}".rstrip())
    return 0


def main_locate(options: argparse.Namespace) -> int:
    """Say where each rank's samples of one training step stand."""
    splits = open_splits(options.destination)
    split = splits.get("train") or next(iter(splits.values()))
    try:
        config = OrderConfig(seed=options.seed, lanes=options.lanes, window=options.window)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.epoch >= 1 << 24:
        raise UsageError(f"--epoch must be below 2^24, got {options.epoch}")
    order = Order([shard.samples for shard in split.manifest.shards], config)
    steps = order.steps(options.global_batch)
    if options.step >= steps:
        raise UsageError(f"--step {options.step}: an epoch has {steps} steps, 0 to {steps - 1}")
    if options.global_batch % options.world:
        raise UsageError(
            f"--global_batch {options.global_batch} is not divisible by --world {options.world}"
        )
    shown = None if options.json else 1
    read_index = lru_cache(split.read_index)
    rows = []
    for rank in range(options.world):
        numbers = order.part(
            epoch=options.epoch,
            step=options.step,
            batch=options.global_batch,
            rank=rank,
            world=options.world,
        )
        for number in numbers[:shown].tolist():
            shard, row = order.place(number)
            index = read_index(shard)
            rows.append(
                {
                    "rank": rank,
                    "shard": split.manifest.shards[shard].url,
                    "offset": int(index.table["offset"][row]),
                    "size": int(index.table["size"][row]),
                    "key": index.key(row),
                }
            )
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(
        f"epoch {options.epoch}, step {options.step} of {steps}: "
        f"{options.global_batch // options.world} samples a rank, the first of each:"
    )
    for place in rows:
        print(
            f"rank {place['rank']:<4} {place['shard']}  offset {place['offset']:>12}  "
            f"{place['size']:>8} bytes  {place['key']}"
        )
    return 0


def _facts(manifest: Manifest, url: str) -> dict[str, object]:
    samples = [shard.samples for shard in manifest.shards]
    return {
        "split": manifest.split,
        "url": url,
        "digest": manifest.digest,
        "samples": manifest.samples,
        "classes": len(manifest.classes),
        "shards": len(samples),
        "samples_a_shard": f"{min(samples)} to {max(samples)}",
        "megabytes": round(manifest.total_bytes / 1e6, 1),
        "packing_seed": manifest.packing.seed,
        "class_names": manifest.classes,
    }


def _packed_classes(destination: str) -> tuple[str, ...] | None:
    """Classes of the training split that is already packed beside, if there is one."""
    train = f"{destination.rstrip('/')}/train"
    if MANIFEST_NAME not in open_store(train).sizes():
        return None
    return PackedSplit.open(train).manifest.classes


class _Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """Progress on a terminal: images/s, MB/s and time left; nothing elsewhere."""

    def __init__(self, title: str, images: int) -> None:
        super().__init__(total=images, desc=title, unit=" images", disable=None, dynamic_ncols=True)
        self._bytes = 0

    def advance(self, shard: Shard) -> None:
        """One more shard is done."""
        self._bytes += shard.bytes
        self.set_postfix_str(
            f"{self._bytes / 1e6 / max(self.format_dict['elapsed'], 1e-3):.0f} MB/s", refresh=False
        )
        self.update(shard.samples)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: object, title: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=title, description=title)
        sub.set_defaults(run=run)
        return sub

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    sub = command("pack", main_pack, "turn an ImageFolder into shards")
    sub.add_argument(
        "source", type=Path, metavar="SRC", help="folder with train/ and val/, or one split"
    )
    sub.add_argument(
        "destination", metavar="DST", help="folder for the shards; each split gets its own"
    )
    sub.add_argument(
        "--shard_size",
        type=byte_size,
        default=Packing().shard_bytes,
        metavar="SIZE",
        help="of one shard, for example 256MB (default 128MB)",
    )
    sub.add_argument("--max_samples", type=positive, metavar="N", help="samples a shard, at most")
    sub.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of the packer's shuffle (default 0)"
    )
    sub.add_argument(
        "--workers", type=positive, default=cores, metavar="N", help="processes (default: cores)"
    )

    sub = command("verify", main_verify, "read every byte again and check it")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument(
        "--workers", type=positive, default=cores, metavar="N", help="processes (default: cores)"
    )

    sub = command("info", main_info, "say what is in a data set")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("locate", main_locate, "say where each rank's samples of a training step stand")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument("--epoch", type=natural, required=True, metavar="E")
    sub.add_argument(
        "--step", type=natural, required=True, metavar="S", help="optimizer step in the epoch"
    )
    sub.add_argument("--global_batch", type=positive, required=True, metavar="B")
    sub.add_argument(
        "--world", type=positive, default=1, metavar="W", help="number of ranks (default 1)"
    )
    defaults = OrderConfig()
    sub.add_argument(
        "--seed",
        type=natural,
        default=defaults.seed,
        metavar="N",
        help="the run's seed (default 0)",
    )
    sub.add_argument("--lanes", type=positive, default=defaults.lanes, metavar="N")
    sub.add_argument("--window", type=positive, default=defaults.window, metavar="N")
    sub.add_argument("--json", action="store_true", help="print every sample as JSON")
    return parser


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Run one command; see reports_errors for the exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
