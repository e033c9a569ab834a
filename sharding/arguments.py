"""The arguments of shard.py's commands: what those that pack take, and places that are refused."""

import argparse
from pathlib import Path

from sharding.console import byte_size, cores, natural, positive
from sharding.errors import UsageError
from sharding.manifest import CHECKS, ON_BAD, ImageRules, Packing
from sharding.store import local_path, local_place

_SURELY_NO_BYTES = 1000


def add_pack(sub: argparse.ArgumentParser) -> None:
    """SRC, DST and all that decides what becomes of one in the other."""
    sub.add_argument(
        "source", type=local_path, metavar="SRC", help="folder with train/ and val/, or one split"
    )
    sub.add_argument(
        "destination", metavar="DST", help="folder for the shards; each split gets its own"
    )
    _add_shards(sub.add_argument_group("shards"))
    _add_labels(sub.add_argument_group("labels"))
    _add_images(sub.add_argument_group("images"))
    group = sub.add_argument_group("where it runs")
    add_workers(group)
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


def shard_size(text: str) -> int:
    """byte_size, but for a small number without a unit, which would make a shard of each image."""
    if text.strip().isdecimal() and 0 < int(text) < _SURELY_NO_BYTES:
        number = int(text)
        raise argparse.ArgumentTypeError(
            f"{text!r} has no unit; write {number}MB or, if bytes are meant, {number}B"
        )
    return byte_size(text)


def add_workers(sub: argparse._ActionsContainer) -> None:
    """How many processes."""
    sub.add_argument(
        "--workers", type=positive, default=cores(), metavar="N", help="processes (default: cores)"
    )


def destination_of(options: argparse.Namespace) -> str:
    """DST, without a slash at its end. Raises UsageError where it is empty."""
    if not options.destination:
        raise UsageError("DST is empty; is a variable unset?")
    return str(options.destination).rstrip("/") or "/"


def refuse_inside(made: str | Path, read: str | Path) -> None:
    """Raise UsageError if what is made would lie among what it is made from."""
    place, among = local_place(str(made)), local_place(str(read))
    if place is not None and among is not None:
        place = place.resolve()
        inside = among.resolve() in (place, *place.parents)
    else:
        inside = f"{made}/".startswith(f"{str(read).rstrip('/')}/")
    if inside:
        raise UsageError(f"{made} is or lies in {read}, which is read; choose another place")


def _add_shards(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--shard_size",
        type=shard_size,
        default=Packing().shard_bytes,
        metavar="SIZE",
        help="of one shard, for example 256MB (default 128MB)",
    )
    group.add_argument("--max_samples", type=positive, metavar="N", help="samples a shard, at most")
    group.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of the packer's shuffle (default 0)"
    )


def _add_labels(group: argparse._ActionsContainer) -> None:
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


def _add_images(group: argparse._ActionsContainer) -> None:
    rules = ImageRules()
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
