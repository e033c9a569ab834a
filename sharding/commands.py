"""What shard.py does when it adopts, checks, copies or gives back a data set, and what it says."""

import argparse
import sys

from tqdm import tqdm

from sharding.adopt import adopt
from sharding.arguments import destination_of, refuse_inside
from sharding.console import ProgressBar, count
from sharding.copy import copy
from sharding.dataset import PackedSplit, open_splits
from sharding.errors import DataError
from sharding.labels import read_classes
from sharding.manifest import Manifest, Shard
from sharding.shuffling import sorted_warning
from sharding.store import open_store
from sharding.unpack import unpack
from sharding.urls import expand
from sharding.verify import verify


def main_index(options: argparse.Namespace) -> int:
    """Adopt the tars of others."""
    urls = expand(options.urls)
    store = open_store(f"{destination_of(options)}/{options.split}")
    passed_over = 0
    with ProgressBar(f"index {options.split}", len(urls), unit=" tars") as bar:

        def progress(shard: Shard, others: int) -> None:
            nonlocal passed_over
            passed_over += others
            bar.advance(shard, by=1)

        manifest = adopt(
            urls,
            store,
            split=options.split,
            classes=read_classes(options.classes) if options.classes else None,
            label_key=options.label_key,
            workers=options.workers,
            progress=progress,
        )
    print(
        f"{options.split}: {_size(manifest)}, {count(len(manifest.classes), 'class')} "
        f"({count(passed_over, 'other file')} passed over); index and manifest in {store.url}"
    )
    split = PackedSplit(store=store, manifest=manifest)
    labels = [split.read_index(number).table["label"] for number in range(len(manifest.shards))]
    if warning := sorted_warning(labels, lanes=options.lanes, window=options.window):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def main_verify(options: argparse.Namespace) -> int:
    """Re-read every byte, or a share; a line for each thing wrong, exit status 3 if any."""
    problems = 0
    for name, split in open_splits(options.destination).items():
        damaged = 0
        with ProgressBar(f"verify {name}", split.manifest.samples) as bar:
            found = verify(split, workers=options.workers, share=options.sample, seed=options.seed)
            for number, lines in found:
                for line in lines:
                    tqdm.write(line, file=sys.stderr)
                problems += len(lines)
                damaged += bool(lines)
                bar.advance(split.manifest.shards[number])
        manifest = split.manifest
        read = (
            f"all {manifest.total_bytes / 1e6:.1f} MB read"
            if options.sample == 1
            else f"all indexes and {options.sample:.2%} of the samples read"
        )
        result = f"{damaged} of them damaged" if damaged else read
        print(f"{name}: {_size(manifest)}, {result}")
    if problems:
        raise DataError(f"{options.destination}: {count(problems, 'problem')}, see above")
    print("everything is as it was packed")
    return 0


def main_unpack(options: argparse.Namespace) -> int:
    """Give the ImageFolder back."""
    refuse_inside(options.folder, options.destination)
    for name, split in open_splits(options.destination).items():
        folder = options.folder / name
        with ProgressBar(f"unpack {name}", split.manifest.samples) as bar:
            unpack(
                split,
                folder,
                encoded=split.manifest.packing is not None,
                by_class=split.manifest.packing is None,
                workers=options.workers,
                progress=bar.advance,
            )
        print(f"{name}: {count(split.manifest.samples, 'image')} in {folder}")
    return 0


def main_copy(options: argparse.Namespace) -> int:
    """Copy every split to another store."""
    destination = destination_of(options)
    refuse_inside(destination, options.source)
    for name, split in open_splits(options.source).items():
        store = open_store(f"{destination}/{name}")
        refuse_inside(store.url, split.store.url)
        with ProgressBar(f"copy {name}", split.manifest.samples) as bar:
            manifest = copy(split, store, workers=options.workers, progress=bar.advance)
        print(f"{name}: {_size(manifest)}, {manifest.total_bytes / 1e6:.1f} MB, in {store.url}")
    return 0


def _size(manifest: Manifest) -> str:
    return f"{count(manifest.samples, 'sample')} in {count(len(manifest.shards), 'shard')}"
