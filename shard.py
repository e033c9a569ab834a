#!/usr/bin/env python3
"""Turn ImageFolder data sets into tar shards, check them, and look into them."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from loaders.locate import places
from loaders.order import Order, OrderConfig
from sharding.arguments import add_pack, add_workers
from sharding.commands import main_copy, main_index, main_unpack, main_verify
from sharding.console import natural, picture, positive, share
from sharding.dataset import PackedSplit, open_splits
from sharding.errors import EXIT_USAGE, UsageError, reports_errors
from sharding.info import MOST_SHARDS, main_info
from sharding.packing import main_pack, main_seal
from sharding.store import local_path

_MOST_SHOWN = 100  # rows of a contact sheet
EXAMPLES = """examples:
  python shard.py pack /data/imagenet /data/imagenet-shards
  python shard.py pack /data/imagenet /data/imagenet-shards --cluster tcp://scheduler:8786
  srun python shard.py pack /fsx/imagenet /fsx/shards --part slurm
  python shard.py seal /fsx/imagenet /fsx/shards
  python shard.py index '/data/cc-{000..127}.tar' /data/cc-index
  python shard.py verify /data/imagenet-shards --sample 5%
  python shard.py copy s3://bucket/imagenet /fsx/imagenet-shards
  python shard.py unpack /data/imagenet-shards /data/imagenet-again
  python shard.py info /data/imagenet-shards
  python shard.py preview /data/imagenet-shards sheet.png --recipe recipes/torchvision_v2.yaml
  python shard.py locate /data/imagenet-shards --epoch 3 --step 1200 --global_batch 1024 --world 8
"""


def main_locate(options: argparse.Namespace) -> int:
    """Say where each rank's samples of one training step stand."""
    split = _training_split(options.destination)
    config = _order(options)
    _check_epoch(options.epoch)
    order = Order([shard.samples for shard in split.manifest.shards], config)
    found = places(
        split,
        order,
        epoch=options.epoch,
        step=options.step,
        global_batch=options.global_batch,
        world=options.world,
        most=None if options.json else 1,
    )
    if options.json:
        print(json.dumps([place._asdict() for place in found], indent=1))
        return 0
    print(
        f"seed {config.seed}, {config.lanes} lanes, window {config.window}\n"
        f"epoch {options.epoch}, step {options.step} of {order.steps(options.global_batch)}: "
        f"{options.global_batch // options.world} samples a rank, the first of each:"
    )
    for place in found:
        print(
            f"rank {place.rank:<4} {place.shard}  offset {place.offset:>12}  "
            f"{place.size:>8} bytes  {place.key}"
        )
    return 0


def main_preview(options: argparse.Namespace) -> int:
    """Draw some samples, and what training makes of them."""
    # Torch and Lightning take seconds to import; the other commands do without.
    from loaders.preview import EPOCHS, draw_preview  # noqa: PLC0415
    from recipes.schema import Recipe, load_recipe  # noqa: PLC0415

    _check_epoch(options.epoch, shown=EPOCHS)
    if options.samples > _MOST_SHOWN:
        raise UsageError(f"--samples must be at most {_MOST_SHOWN}, got {options.samples}")
    recipe = load_recipe(options.recipe) if options.recipe else Recipe()
    split = _training_split(options.destination)
    notes = ["Mixup and cutmix, which mix whole images on the device, are not shown."]
    sheet = draw_preview(
        split,
        recipe.data,
        title=f"{split.store.url}, {options.recipe or 'default options'}",
        seed=recipe.seed if options.seed is None else options.seed,
        epoch=options.epoch,
        samples=options.samples,
        notes=notes if recipe.mix.mixes else [],
    )
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.picture, "PNG")
    print(f"{options.picture}: {sheet.width} x {sheet.height} pixels")
    return 0


def _order(options: argparse.Namespace) -> OrderConfig:
    """The order of a run: the recipe's, where one is given, and what was typed over it."""
    values = dataclasses.asdict(OrderConfig())
    if options.recipe:
        from recipes.schema import load_recipe  # noqa: PLC0415  (torch takes seconds to import)

        recipe = load_recipe(options.recipe)
        values = {"seed": recipe.seed, "lanes": recipe.data.lanes, "window": recipe.data.window}
    typed = {name: getattr(options, name) for name in values}
    values |= {name: value for name, value in typed.items() if value is not None}
    try:
        return OrderConfig(**values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _training_split(url: str) -> PackedSplit:
    """The training split, or the only one."""
    splits = open_splits(url)
    return splits.get("train") or next(iter(splits.values()))


def _check_epoch(epoch: int, *, shown: int = 1) -> None:
    if epoch + shown > 1 << 24:  # 24 bits of it name random streams
        raise UsageError(f"--epoch must be at most {(1 << 24) - shown}, got {epoch}")


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
        add_pack(command(name, run, title))

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
    add_workers(sub)

    sub = command("verify", main_verify, "read every byte again and check it")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument(
        "--sample", type=share, default=1.0, metavar="5%", help="this share of the samples only"
    )
    sub.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="chooses other samples (default 0)"
    )
    add_workers(sub)

    sub = command("unpack", main_unpack, "give the ImageFolder back, byte for byte")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument("folder", type=local_path, metavar="FOLDER", help="new or empty")
    add_workers(sub)

    sub = command("copy", main_copy, "copy a data set between stores; checked, goes on when killed")
    sub.add_argument("source", metavar="SRC")
    sub.add_argument("destination", metavar="DST")
    add_workers(sub)

    sub = command("info", main_info, "say what is in a data set, with small histograms")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--all",
        action="store_true",
        help="read the index of every shard for the histograms "
        f"(default: {MOST_SHARDS} of a split; its classes are counted where that is all)",
    )

    sub = command("preview", main_preview, "draw samples, and what training makes of them")
    sub.add_argument("destination", metavar="DST")
    sub.add_argument("picture", type=picture, metavar="PNG")
    sub.add_argument(
        "--samples", type=positive, default=8, metavar="N", help="the epoch's first (default 8)"
    )
    sub.add_argument(
        "--epoch", type=natural, default=0, metavar="E", help="the first that is shown (default 0)"
    )
    sub.add_argument(
        "--recipe", type=Path, metavar="YAML", help="says how images are augmented, and the seed"
    )
    sub.add_argument("--seed", type=natural, metavar="N", help="the run's (default: the recipe's)")

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
        "--recipe", type=Path, metavar="YAML", help="whose seed, lanes and window are the run's"
    )
    for name in ("seed", "lanes", "window"):
        sub.add_argument(
            f"--{name}",
            type=natural if name == "seed" else positive,
            metavar="N",
            help=f"the run's (default: the recipe's, or {getattr(OrderConfig(), name)})",
        )
    sub.add_argument("--json", action="store_true", help="print every sample as JSON")
    return parser


def _add_order(sub: argparse.ArgumentParser) -> None:
    defaults = OrderConfig()
    for name, value in (("lanes", defaults.lanes), ("window", defaults.window)):
        sub.add_argument(
            f"--{name}", type=positive, default=value, metavar="N", help="of the order that trains"
        )


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Run one command; see reports_errors for the exit status."""
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    options = parser.parse_args(arguments)
    if options.s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = options.s3_endpoint  # where botocore looks for it, too
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
