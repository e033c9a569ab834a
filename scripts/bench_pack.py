#!/usr/bin/env python3
"""Measure our packer beside those of others, on the same images, from a warm cache.

Each packs an ImageFolder in a process of its own, which counts the seconds from the listing of the
files to the last byte written, without the start of Python and its imports. Rounds are interleaved
and the median counts. Ours hashes every image and every shard, the others hash nothing; nobody else
calls fsync, so ours is measured without and with it. `tar` is the mark to reach: it only copies.

  python scripts/bench_pack.py --images /data/imagenet/val
"""
# mypy: disable-error-code="import-not-found,import-untyped"
# ruff: noqa: PLC0415 (each packer is imported in the interpreter that has it)

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 64_000_000
WORKERS = 2

Pack = Callable[[Path, Path], None]
"""(ImageFolder, what to make)"""


def photos(source: Path) -> list[tuple[str, int]]:
    """Path and label of each image."""
    folders = sorted((source / "train").iterdir())
    return [(str(path), i) for i, folder in enumerate(folders) for path in sorted(folder.iterdir())]


def ours(*, fsync: bool) -> Pack:
    """`shard.py pack`, two workers."""
    from sharding.manifest import Packing
    from sharding.pack import Job, pack
    from sharding.source import scan
    from sharding.store import LocalStore

    if not fsync:
        os.fsync = lambda fd: None  # workers are forked, so it holds for them too
    packing = Packing(shard_bytes=SHARD_BYTES)

    def make(source: Path, out: Path) -> None:
        listing = scan(source / "train")
        job = Job(listing=listing, store=LocalStore(out), split="train", packing=packing)
        pack(job, workers=WORKERS)

    return make


def webdataset() -> Pack:
    """The ShardWriter of webdataset, one process."""
    from webdataset import ShardWriter

    def make(source: Path, out: Path) -> None:
        out.mkdir()
        with ShardWriter(str(out / "%06d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
            for number, (path, label) in enumerate(photos(source)):
                image = Path(path).read_bytes()
                writer.write({"__key__": f"{number:07d}", "jpg": image, "cls": label})

    return make


def mosaic() -> Pack:
    """The MDSWriter of MosaicML Streaming, one process."""
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}

    def make(source: Path, out: Path) -> None:
        with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_BYTES) as writer:
            for path, label in photos(source):
                writer.write({"image": Path(path).read_bytes(), "label": label})

    return make


def litdata_sample(photo: tuple[str, int]) -> dict[str, object]:
    """What LitData stores of a photo."""
    return {"image": Path(photo[0]).read_bytes(), "label": photo[1]}


def litdata() -> Pack:
    """LitData's optimize, two workers."""
    from litdata import optimize

    def make(source: Path, out: Path) -> None:
        optimize(
            litdata_sample, photos(source), str(out), chunk_bytes=SHARD_BYTES, num_workers=WORKERS
        )

    return make


def tar() -> Pack:
    """One `tar` of all files."""

    def make(source: Path, out: Path) -> None:
        out.mkdir()
        subprocess.run(["tar", "cf", str(out / "all.tar"), "-C", str(source), "train"], check=True)

    return make


PACKERS: dict[str, tuple[str, Callable[[], Pack]]] = {
    "ours": ("", partial(ours, fsync=False)),
    "ours, with fsync": ("", partial(ours, fsync=True)),
    "webdataset": ("", webdataset),
    "mosaic": ("mosaic", mosaic),
    "litdata": ("litdata", litdata),
    "tar": ("", tar),
}
"""Name -> (its interpreter's folder in .bench, what imports it)."""


def run(name: str, source: Path, out: Path) -> float | None:
    """The seconds that a packer takes in its own process; None if it cannot run."""
    venv, _ = PACKERS[name]
    python = ROOT / ".bench" / venv / "bin" / "python" if venv else Path(sys.executable)
    if not python.exists():
        return None
    process = subprocess.run(
        [str(python), str(Path(__file__)), "--packer", name, str(source), str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
    )
    shutil.rmtree(out, ignore_errors=True)
    if process.returncode:
        print(f"{name}: {process.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return float(json.loads(process.stdout.splitlines()[-1]))


def measure_plan(samples: int) -> None:
    """Plan the shards of a listing like ImageNet's, and print seconds and memory."""
    import numpy as np

    from sharding.manifest import Packing
    from sharding.pack import Job
    from sharding.source import Listing
    from sharding.store import LocalStore

    generator = np.random.default_rng(0)
    names = [f"n{1000 + i * 1000 // samples:08d}" for i in range(samples)]
    paths = [f"{name}/{name}_{i}.JPEG" for i, name in enumerate(names)]
    listing = Listing(
        root=Path("/images"),
        classes=tuple(dict.fromkeys(names)),
        paths=paths,
        files=paths,
        labels=(np.arange(samples) * 1000 // samples).astype(np.uint32),
        sizes=generator.integers(10_000, 210_000, samples),
        ignored=0,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    job = Job(listing=listing, store=LocalStore(Path("/out")), split="train", packing=Packing())
    shards, _ = len(job.tasks), job.plan
    print(
        f"{samples:,} files planned in {time.perf_counter() - begin:.2f} s as {shards} shards; "
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB, of which the "
        f"listing and Python are {before / 1e3:.0f} MB"
    )


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs, any depth")
    parser.add_argument("--count", type=int, default=5000, help="images to pack (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--plan", type=int, metavar="N", help="only plan N files: seconds, memory")
    parser.add_argument("--packer", nargs=3, help=argparse.SUPPRESS)  # what a child is told
    options = parser.parse_args()
    if options.packer:
        name, source, out = options.packer
        make = PACKERS[name][1]()
        begin = time.perf_counter()
        make(Path(source), Path(out))
        print(json.dumps(time.perf_counter() - begin))
        return 0
    if options.plan:
        measure_plan(options.plan)
        return 0
    if options.images is None:
        parser.error("give --images FOLDER")
    files = sorted(path for path in options.images.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix="bench_pack_", dir=options.images.parent) as folder:
        work = Path(folder)
        total = 0
        for number in range(options.count):
            source = files[number % len(files)]
            target = work / "images/train" / f"class_{number % 10}" / f"{number:07d}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)  # a tar stores a hard link without its bytes
            total += source.stat().st_size
        seconds: dict[str, list[float]] = {name: [] for name in PACKERS}
        for number in range(options.rounds + 1):
            for name in PACKERS:
                taken = run(name, work / "images", work / "out")
                if number and taken is not None:  # the first warms up
                    seconds[name].append(taken)
    print(f"{options.count} images, {total / 1e6:.0f} MB, {WORKERS} processes where there can be")
    mine = statistics.median(seconds["ours"])
    for name, each in seconds.items():
        if not each:
            print(f"{name:18} missing")
            continue
        median = statistics.median(each)
        print(
            f"{name:18}{median:7.2f} s ({min(each):.2f} to {max(each):.2f}) "
            f"{total / median / 1e6:7.0f} MB/s   ours is {median / mine:.2f} x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
