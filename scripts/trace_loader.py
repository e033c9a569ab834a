#!/usr/bin/env python3
"""Run the real loader for every rank and print one line for each global step.

A line holds the step and the XXH3-64 of the step's images and labels in global-batch order. The
lines must not change with --world, --workers, --accumulate or --format, nor with where --from
begins: that is what makes a run resumable on any machines.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import xxhash

from loaders.datamodule import FORMATS, DataConfig, open_reader
from loaders.loader import StreamingLoader
from loaders.order import OrderConfig
from loaders.pipeline import Batch
from loaders.topology import Topology
from sharding.console import byte_size, natural, positive
from sharding.errors import UsageError, reports_errors
from sharding.manifest import Packing

EXAMPLE = """example:
  python scripts/trace_loader.py /data/shards --global_batch 64 --world 2 --workers 3 --steps 5
"""


def global_steps(loaders: list[StreamingLoader], accumulate: int) -> Iterator[list[Batch]]:
    """Yield the batches of each global step in global-batch order: rank by rank, piece by piece."""
    streams = [iter(loader) for loader in loaders]
    while True:
        step = [list(islice(stream, accumulate)) for stream in streams]
        if not step[0]:
            return
        yield [piece for rank in step for piece in rank]


def line(step: int, batches: list[Batch]) -> dict[str, Any]:
    """The step's hash; every sample counts with its pixels and its label, in order."""
    digest = xxhash.xxh3_64()
    for batch in batches:
        for image, label in zip(batch.images.numpy(), batch.labels.numpy(), strict=True):
            digest.update(image)
            digest.update(label.astype("<i8").tobytes())
    return {"step": step, "xxh3": digest.hexdigest()}


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Trace some steps of an epoch."""
    options = _options(arguments)
    try:
        packing = Packing(
            seed=options.pack_seed, shard_bytes=options.shard_size, max_samples=options.max_samples
        )
        config = DataConfig(root=options.data, format=options.format, packing=packing)
        order = OrderConfig(seed=options.seed, lanes=options.lanes, window=options.window)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.epoch >= 1 << 24:
        raise UsageError(f"--epoch must be below 2^24, got {options.epoch}")
    reader = open_reader(config, "train")
    loaders = []
    for rank in range(options.world):
        loader = StreamingLoader(
            reader,
            order=order,
            augment=config.augment,
            topology=Topology(
                global_batch=options.global_batch,
                rank=rank,
                world=options.world,
                accumulate=options.accumulate,
            ),
            size=options.image_size,
            workers=options.workers,
        )
        epoch_steps = len(loader) // options.accumulate
        if options.first >= epoch_steps:
            raise UsageError(f"--from {options.first}: an epoch has {epoch_steps} steps, from 0")
        start = {"epoch": options.epoch, "position": options.first * options.global_batch}
        loader.load_state_dict(loader.state_dict() | start)  # as a resume does
        loaders.append(loader)
    steps = islice(global_steps(loaders, options.accumulate), options.steps)
    for step, batches in enumerate(steps, options.first):
        facts = line(step, batches)
        if options.keys:
            facts["keys"] = [reader.key(n) for batch in batches for n in batch.numbers.tolist()]
        if options.json:
            print(json.dumps(facts), flush=True)
        else:
            print(facts["step"], facts["xxh3"], *facts.get("keys", []), flush=True)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    order, packing = OrderConfig(), Packing()
    parser.add_argument("data", metavar="DST", help="folder that holds train/")
    parser.add_argument("--global_batch", type=positive, required=True, metavar="B")
    parser.add_argument("--world", type=positive, default=1, metavar="W", help="ranks (default 1)")
    parser.add_argument(
        "--workers", type=natural, default=0, metavar="K", help="of each rank (default 0)"
    )
    parser.add_argument(
        "--accumulate", type=positive, default=1, metavar="A", help="batches a step (default 1)"
    )
    parser.add_argument("--epoch", type=natural, default=0, metavar="E")
    parser.add_argument(
        "--from", type=natural, default=0, dest="first", metavar="S", help="first step"
    )
    parser.add_argument("--steps", type=natural, metavar="N", help="default: to the epoch's end")
    parser.add_argument(
        "--image_size", type=positive, default=224, metavar="P", help="pixels (default 224)"
    )
    parser.add_argument("--keys", action="store_true", help="print the samples' keys, too")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--seed", type=natural, default=order.seed, help="of the run (default 0)")
    parser.add_argument("--lanes", type=positive, default=order.lanes, metavar="N")
    parser.add_argument("--window", type=positive, default=order.window, metavar="N")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="shards",
        help="imagefolder: DST is an ImageFolder; the next three say how it would be packed",
    )
    parser.add_argument("--shard_size", type=byte_size, default=packing.shard_bytes, metavar="SIZE")
    parser.add_argument("--max_samples", type=positive, metavar="N")
    parser.add_argument("--pack_seed", type=natural, default=packing.seed, metavar="N")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
