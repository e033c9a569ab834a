#!/usr/bin/env python3
"""Copy some classes of an ImageFolder, a few images each: a small real data set for first runs.

  python scripts/make_tiny_subset.py /data/imagenet data/tiny --classes 10 --images 100

Classes are taken in label order, images in name order. A validation split gets a tenth as many
images a class, at least one, or what there is.
"""

import argparse
import shutil
import sys
from pathlib import Path

from sharding.console import positive
from sharding.errors import UsageError, reports_errors
from sharding.layouts import find_splits, flat_labels, is_flat
from sharding.source import scan


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Copy the subset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="holds train/ and val/, or is one split"
    )
    parser.add_argument(
        "folder", type=Path, metavar="DST", help="is made; must not hold anything yet"
    )
    parser.add_argument("--classes", type=positive, default=10, metavar="N", help="default 10")
    parser.add_argument(
        "--images", type=positive, default=100, metavar="M", help="a class (default 100)"
    )
    options = parser.parse_args(arguments)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise UsageError(f"{options.folder} is not empty; choose another folder or remove it")
    for split, root in find_splits(options.source).items():
        listing = scan(root, class_of=flat_labels(options.source, root) if is_flat(root) else None)
        if options.classes > len(listing.classes):
            raise UsageError(
                f"--classes {options.classes}: {root} has only {len(listing.classes)} classes"
            )
        images = options.images if split == "train" else max(options.images // 10, 1)
        taken = [0] * options.classes
        samples = zip(listing.files, listing.paths, listing.labels.tolist(), strict=True)
        for file, path, label in samples:
            if label < options.classes and taken[label] < images:
                taken[label] += 1
                target = options.folder / split / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / file, target)
        print(f"{options.folder / split}: {sum(taken)} images of {options.classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
