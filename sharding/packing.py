"""What `shard.py pack` and `seal` do and say: each split of a folder is a job."""

import argparse
import os
import sys
from collections.abc import Iterator

from sharding.arguments import destination_of, refuse_inside
from sharding.console import ProgressBar, count
from sharding.dataset import PackedSplit
from sharding.errors import UsageError
from sharding.labels import read_classes
from sharding.layouts import SPLITS, find_splits, flat_labels, is_flat
from sharding.lock import Part
from sharding.manifest import MANIFEST_NAME, ImageRules, Manifest, Packing
from sharding.pack import REJECTED_NAME, Job, pack, pack_part, seal
from sharding.source import scan
from sharding.store import Store, open_store


def main_pack(options: argparse.Namespace) -> int:
    """Pack every split below SRC, or one part of each."""
    part = _part(options.part)
    for job, ignored in list(_jobs(options)):  # val is looked at before train takes its hours
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
        _say_lonely(destination_of(options))
    return 0


def main_seal(options: argparse.Namespace) -> int:
    """Check the shards that all parts made and write the manifests."""
    for job, ignored in _jobs(options):
        with ProgressBar(f"seal {job.split}", len(job.listing)) as bar:
            manifest = seal(
                job, workers=options.workers, cluster=options.cluster, progress=bar.advance
            )
        _say_packed(manifest, job.store, ignored)
    _say_lonely(destination_of(options))
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
    destination = destination_of(options)
    classes = read_classes(options.classes) if options.classes else None
    splits = find_splits(options.source)
    flat = {split for split, folder in splits.items() if is_flat(folder)}
    if not flat and (options.val_labels or options.synsets):
        raise UsageError(
            f"--val_labels and --synsets are for images without class folders; {options.source} "
            "has class folders, which are its labels"
        )
    for split, folder in splits.items():
        refuse_inside(f"{destination}/{split}", folder)
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


def _say_packed(manifest: Manifest, store: Store, ignored: int) -> None:
    counts = manifest.source
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.kinds.items())
    print(
        f"{manifest.split}: {count(counts.found, 'image')} found = {counts.packed} packed + "
        f"{counts.rejected} rejected ({count(ignored, 'other file')} ignored), "
        f"{count(len(manifest.classes), 'class')}, {count(len(manifest.shards), 'shard')}, "
        f"{manifest.total_bytes / 1e6:.1f} MB in {store.url} ({kinds})"
    )
    if counts.rejected:
        print(
            f"warning: {count(counts.rejected, 'rejected image')}, listed in "
            f"{store.url}/{REJECTED_NAME}",
            file=sys.stderr,
        )


def _say_lonely(destination: str) -> None:
    """Say that training needs a validation split, where there is none beside the training split."""
    packed = {
        split: MANIFEST_NAME in open_store(f"{destination}/{split}").sizes() for split in SPLITS
    }
    if packed["train"] and not packed["val"]:
        print(
            f"next: {destination} has no val/ yet, which train.py needs: "
            f"shard.py pack SRC/val {destination}"
        )


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
