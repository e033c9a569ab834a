"""What shard.py does when it makes, checks or gives back a data set, and what it says of it."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from sharding.adopt import adopt
from sharding.console import ProgressBar
from sharding.copy import copy
from sharding.dataset import PackedSplit, open_splits
from sharding.errors import DataError, UsageError
from sharding.labels import read_classes
from sharding.layouts import find_splits, flat_labels, is_flat
from sharding.lock import Part
from sharding.manifest import MANIFEST_NAME, ImageRules, Manifest, Packing, Shard
from sharding.pack import REJECTED_NAME, Job, pack, pack_part, seal
from sharding.shuffling import sorted_warning
from sharding.source import scan
from sharding.store import Store, local_path, open_store
from sharding.unpack import unpack
from sharding.urls import expand
from sharding.verify import verify


def main_pack(options: argparse.Namespace) -> int:
    """Pack every split below SRC, or one part of each."""
    part = _part(options.part)
    for job, ignored in _jobs(options):
        with ProgressBar(f"pack {job.split}", len(job.listing)) as bar:
            if part is not None:
                made = pack_part(
                    job,
                    part,
                    workers=options.workers,
                    cluster=options.cluster,
                    progress=bar.advance,
                )
                print(
                    f"{job.split}: part {part.i} of {part.n}: {made} of {len(job.tasks)} shards in "
                    f"{job.store.url}; when all parts are there: shard.py seal"
                )
                continue
            manifest = pack(
                job, workers=options.workers, cluster=options.cluster, progress=bar.advance
            )
        _say_packed(manifest, job.store, ignored)
    if part is None:
        _say_lonely(_destination(options))
    return 0


def main_seal(options: argparse.Namespace) -> int:
    """Check the shards that all parts made and write the manifests."""
    for job, ignored in _jobs(options):
        with ProgressBar(f"seal {job.split}", len(job.listing)) as bar:
            manifest = seal(
                job, workers=options.workers, cluster=options.cluster, progress=bar.advance
            )
        _say_packed(manifest, job.store, ignored)
    _say_lonely(_destination(options))
    return 0


def main_index(options: argparse.Namespace) -> int:
    """Adopt the tars of others."""
    urls = expand(options.urls)
    store = open_store(f"{_destination(options)}/{options.split}")
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
        f"{options.split}: {manifest.samples} samples in {len(manifest.shards)} shards, "
        f"{len(manifest.classes)} classes ({passed_over} other files passed over); index and "
        f"manifest in {store.url}"
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
        print(f"{name}: {manifest.samples} samples in {len(manifest.shards)} shards, {result}")
    if problems:
        raise DataError(f"{options.destination}: {problems} problem(s), see above")
    print("everything is as it was packed")
    return 0


def main_unpack(options: argparse.Namespace) -> int:
    """Give the ImageFolder back."""
    _outside(options.folder, options.destination)
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
        print(f"{name}: {split.manifest.samples} images in {folder}")
    return 0


def main_copy(options: argparse.Namespace) -> int:
    """Copy every split to another store."""
    destination = _destination(options)
    _outside(destination, options.source)
    for name, split in open_splits(options.source).items():
        store = open_store(f"{destination}/{name}")
        with ProgressBar(f"copy {name}", split.manifest.samples) as bar:
            manifest = copy(split, store, workers=options.workers, progress=bar.advance)
        print(
            f"{name}: {manifest.samples} samples in {len(manifest.shards)} shards, "
            f"{manifest.total_bytes / 1e6:.1f} MB, in {store.url}"
        )
    return 0


def _jobs(options: argparse.Namespace) -> Iterator[tuple[Job, int]]:
    """The splits below SRC, and the number of files ignored in each.

    A validation split takes its classes from the training split.
    """
    try:
        packing = Packing(
            seed=options.seed, shard_bytes=options.shard_size, max_samples=options.max_samples
        )
        rules = ImageRules(
            check=options.check,
            on_bad=options.on_bad,
            max_pixels=options.max_pixels,
            resize=options.resize,
            quality=options.quality,
            transcode=options.transcode,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    destination = _destination(options)
    classes = read_classes(options.classes) if options.classes else None
    splits = find_splits(options.source)
    flat = {split for split, folder in splits.items() if is_flat(folder)}
    if not flat and (options.val_labels or options.synsets):
        raise UsageError(
            f"--val_labels and --synsets are for images without class folders; {options.source} "
            "has class folders, which are its labels"
        )
    for split, folder in splits.items():
        _outside(f"{destination}/{split}", folder)
        if split == "val":
            classes = _agreed(classes, _packed_classes(destination), destination)
        class_of = None
        if split in flat:
            class_of = flat_labels(
                options.source, folder, val_labels=options.val_labels, synsets=options.synsets
            )
        listing = scan(folder, classes=classes, class_of=class_of)
        classes = listing.classes
        store = open_store(f"{destination}/{split}")
        job = Job(listing=listing, store=store, split=split, packing=packing, rules=rules)
        yield job, listing.ignored


def _outside(made: str | Path, read: str | Path) -> None:
    """Raise UsageError if what is made would lie among what it is made from."""
    if any("://" in str(place) for place in (made, read)):
        inside = str(made).rstrip("/") == str(read).rstrip("/")
    else:
        place = local_path(str(made)).resolve()
        inside = local_path(str(read)).resolve() in (place, *place.parents)
    if inside:
        raise UsageError(f"{made} is or lies in {read}, which is read; choose another place")


def _destination(options: argparse.Namespace) -> str:
    if not options.destination:
        raise UsageError("DST is empty; is a variable unset?")
    return str(options.destination).rstrip("/") or "/"


def _say_packed(manifest: Manifest, store: Store, ignored: int) -> None:
    counts = manifest.source
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.kinds.items())
    print(
        f"{manifest.split}: {counts.found} images found = {counts.packed} packed + "
        f"{counts.rejected} rejected ({ignored} other files ignored), "
        f"{len(manifest.classes)} classes, {len(manifest.shards)} shards, "
        f"{manifest.total_bytes / 1e6:.1f} MB in {store.url} ({kinds})"
    )
    if counts.rejected:
        print(
            f"warning: the {counts.rejected} rejected images are listed in "
            f"{store.url}/{REJECTED_NAME}",
            file=sys.stderr,
        )


def _say_lonely(destination: str) -> None:
    """Say that training needs a validation split, where there is none beside the training split."""
    packed = {
        split: MANIFEST_NAME in open_store(f"{destination}/{split}").sizes()
        for split in ("train", "val")
    }
    if packed["train"] and not packed["val"]:
        print(f"next: {destination} has no val/ yet, which train.py needs: shard.py pack SRC/val")


def _part(text: str | None) -> Part | None:
    """'2/8', or 'slurm' for this task of a SLURM step."""
    if text is None:
        return None
    if text == "slurm":
        words = [os.environ.get(name) for name in ("SLURM_PROCID", "SLURM_NTASKS")]
        if None in words:
            raise UsageError("--part slurm: SLURM_PROCID and SLURM_NTASKS are not set; use srun")
        text = "/".join(map(str, words))
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal()):
        raise UsageError(f"--part {text!r} is no part; write for example 0/8, the first of eight")
    try:
        return Part(int(i), int(n))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _agreed(
    classes: tuple[str, ...] | None, packed: tuple[str, ...] | None, destination: str
) -> tuple[str, ...] | None:
    """The classes of a validation split: those of the training split, wherever they are known."""
    if None not in (classes, packed) and classes != packed:
        raise UsageError(
            f"the training split in {destination}/train was packed with other classes, or in "
            "another order; pack both together, or give the same --classes to both"
        )
    return packed if classes is None else classes


def _packed_classes(destination: str) -> tuple[str, ...] | None:
    """Classes of the training split that is already packed beside, if there is one."""
    train = f"{destination}/train"
    if MANIFEST_NAME not in open_store(train).sizes():
        return None
    return PackedSplit.open(train).manifest.classes
