#!/usr/bin/env python3
"""Turn ImageFolder data sets into tar shards, check them, and look into them."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from loaders.order import Order, OrderConfig
from sharding.commands import main_copy, main_index, main_pack, main_seal, main_unpack, main_verify
from sharding.console import byte_size, cores, natural, positive, share
from sharding.dataset import open_splits
from sharding.errors import UsageError, reports_errors
from sharding.manifest import CHECKS, ON_BAD, ImageRules, Manifest, Packing

EXAMPLES = """examples:
  python shard.py pack /data/imagenet /data/imagenet-shards
  python shard.py pack /data/imagenet /data/imagenet-shards --cluster tcp://scheduler:8786
  srun python shard.py pack /fsx/imagenet /fsx/shards --part slurm
  python shard.py seal /fsx/imagenet /fsx/shards
  python shard.py index '/data/cc-{000..127}.tar' /data/cc-index
  python shard.py verify /data/imagenet-shards --sample 5%%
  python shard.py copy s3://bucket/imagenet /fsx/imagenet-shards
  python shard.py unpack /data/imagenet-shards /data/imagenet-again
  python shard.py info /data/imagenet-shards
  python shard.py locate /data/imagenet-shards --epoch 3 --step 1200 --global_batch 1024 --world 8
"""


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
        "packing_seed": manifest.packing.seed if manifest.packing else "none: shards of others",
        "images_rejected": manifest.source.rejected,
        "kinds": ", ".join(f"{n} {kind}" for kind, n in manifest.source.kinds.items()) or "unknown",
        "made_anew": _made_anew(manifest.images),
        "class_names": manifest.classes,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], title: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=title, description=title)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--s3_endpoint", metavar="URL", help="of S3, if it is not Amazon's (AWS_ENDPOINT_URL)"
        )
        return sub

    for name, run, title in (
        ("pack", main_pack, "turn an ImageFolder into shards"),
        ("seal", main_seal, "finish what `pack --part` made; takes the options of pack"),
    ):
        _add_pack(command(name, run, title))

    sub = command("index", main_index, "adopt webdataset tars that others made, as they are")
    sub.add_argument("urls", metavar="URLS", help="'folder/name-{000..999}.tar'")
    sub.add_argument("destination", metavar="DST", help="folder for index and manifest")
    sub.add_argument("--split", default="train", metavar="NAME", help="default: train")
    sub.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of the labels, a line each"
    )
    sub.add_argument(
        "--label_key", default="label", metavar="KEY", help="of samples with .json (default: label)"
    )
    _add_order(sub)
    _add_workers(sub)

    sub = command("verify", main_verify, "read every byte again and check it")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument(
        "--sample", type=share, default=1.0, metavar="5%", help="this share of the samples only"
    )
    sub.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="chooses other samples (default 0)"
    )
    _add_workers(sub)

    sub = command("unpack", main_unpack, "give the ImageFolder back, byte for byte")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty")
    _add_workers(sub)

    sub = command("copy", main_copy, "copy a data set between stores; checked, goes on when killed")
    sub.add_argument("source", metavar="SRC")
    sub.add_argument("destination", metavar="DST")
    _add_workers(sub)

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
    sub.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="the run's seed (default 0)"
    )
    _add_order(sub)
    sub.add_argument("--json", action="store_true", help="print every sample as JSON")
    return parser


def _add_pack(sub: argparse.ArgumentParser) -> None:
    rules = ImageRules()
    sub.add_argument(
        "source", type=Path, metavar="SRC", help="folder with train/ and val/, or one split"
    )
    sub.add_argument(
        "destination", metavar="DST", help="folder for the shards; each split gets its own"
    )
    group = sub.add_argument_group("shards")
    group.add_argument(
        "--shard_size",
        type=byte_size,
        default=Packing().shard_bytes,
        metavar="SIZE",
        help="of one shard, for example 256MB (default 128MB)",
    )
    group.add_argument("--max_samples", type=positive, metavar="N", help="samples a shard, at most")
    group.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of the packer's shuffle (default 0)"
    )
    group = sub.add_argument_group("labels")
    group.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names in label order, one a line"
    )
    group.add_argument(
        "--val_labels",
        type=Path,
        metavar="FILE",
        help="of a flat val: LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt",
    )
    group.add_argument(
        "--synsets",
        type=Path,
        metavar="FILE",
        help="for the ground truth's numbers: the devkit's meta.mat, or map_clsloc.txt",
    )
    group = sub.add_argument_group("images")
    group.add_argument("--check", choices=CHECKS, default=rules.check, help="default: %(default)s")
    group.add_argument(
        "--on_bad", choices=ON_BAD, default=rules.on_bad, help="bad images (default: %(default)s)"
    )
    group.add_argument(
        "--max_pixels",
        type=positive,
        default=rules.max_pixels,
        metavar="N",
        help="width x height above which an image is bad (default: %(default)s)",
    )
    group.add_argument(
        "--resize", type=positive, metavar="PIXELS", help="shrink a longer shorter side to this"
    )
    group.add_argument(
        "--quality",
        type=positive,
        default=rules.quality,
        metavar="Q",
        help="of JPEGs made anew (default: %(default)s)",
    )
    group.add_argument(
        "--transcode", action="store_true", help="store CMYK JPEGs, PNGs and WebPs as plain JPEGs"
    )
    group = sub.add_argument_group("where it runs")
    _add_workers(group)
    group.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="a Dask scheduler, tcp://host:8786; or local, for Dask on this machine",
    )
    group.add_argument(
        "--part",
        metavar="i/n",
        help="make the i-th of n parts, from 0, for a job array; slurm: this task of srun's",
    )


def _add_order(sub: argparse.ArgumentParser) -> None:
    defaults = OrderConfig()
    for name, value in (("lanes", defaults.lanes), ("window", defaults.window)):
        sub.add_argument(
            f"--{name}", type=positive, default=value, metavar="N", help="of the order that trains"
        )


def _add_workers(sub: argparse._ActionsContainer) -> None:
    sub.add_argument(
        "--workers", type=positive, default=cores(), metavar="N", help="processes (default: cores)"
    )


def _made_anew(rules: ImageRules) -> str:
    steps = [f"shorter side at most {rules.resize}"] if rules.resize else []
    steps += ["transcoded to JPEG"] if rules.transcode else []
    return f"{' and '.join(steps)}, quality {rules.quality}" if steps else "nothing"


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Run one command; see reports_errors for the exit status."""
    options = _parser().parse_args(arguments)
    if options.s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = options.s3_endpoint  # where botocore looks for it, too
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
