#!/usr/bin/env python3
"""Download a small public data set, and leave it as an ImageFolder with train/ and val/.

  imagenette   photographs of 10 ImageNet classes; --size says how large (default 160px)
  cifar10      60,000 images of 32 x 32 pixels, written as PNG: every pixel as it was published,
               at 80 us of decoding an image, where a JPEG would take 10

torchvision downloads and checks the archives. A download that was stopped begins anew; an archive
that is whole is not fetched again. FOLDER appears when everything is in it.
"""

import argparse
import contextlib
import http.client
import shutil
import socket
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchvision.datasets import CIFAR10, Imagenette
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))

import shard
from sharding.errors import DataError, UsageError, reports_errors
from sharding.source import scan

EXAMPLES = """examples:
  python scripts/get_dataset.py imagenette --pack
  python scripts/get_dataset.py imagenette /data/imagenette-320 --size 320px
  python scripts/get_dataset.py cifar10 --pack
"""
SHARD_SIZES = {"imagenette": "8MB", "cifar10": "2MB"}
"""So that also a small data set is some tens of shards, as a large one is hundreds."""
SIZES = ("160px", "320px", "full")
_TIMEOUT_S = 60.0  # without an answer; torchvision itself would wait for ever


def get_imagenette(staging: Path, size: str) -> Path:
    """The archive's folder, which is an ImageFolder. Raises what `_explained` explains."""
    url, _ = Imagenette._ARCHIVES[size]  # noqa: SLF001  (for the errors; torchvision keeps it there)
    with _explained(url, staging):
        for split in ("train", "val"):
            Imagenette(staging, split, size, download=True)
    return next(staging.glob("*/train")).parent


def get_cifar10(staging: Path) -> Path:
    """A new folder of PNGs. Raises what `_explained` explains."""
    made = staging / "made"
    for split in ("train", "val"):
        with _explained(CIFAR10.url, staging):
            images: Any = CIFAR10(staging, train=split == "train", download=True)
        for name in images.classes:
            (made / split / name).mkdir(parents=True)
        for number in tqdm(range(len(images)), f"write {split}", unit=" images", disable=None):
            image, label = images[number]
            image.save(made / split / images.classes[label] / f"{number:05}.png")
    return made


@contextlib.contextmanager
def _explained(url: str, staging: Path) -> Iterator[None]:
    """What goes wrong with a download, as an error that says what can be done."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    archive = staging / url.rpartition("/")[2]
    try:
        yield
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
        reason = getattr(e, "reason", e)
        if isinstance(e, urllib.error.HTTPError):
            reason = str(e)
            e.close()
        raise ConnectionError(
            f"cannot download {url}: {reason}. Where this machine has no network access, bring "
            f"the archive to {archive} and start the same command again"
        ) from e
    except RuntimeError as e:  # torchvision's, of a wrong MD5 sum
        raise DataError(
            f"{archive}, from {url}, is not the archive that torchvision knows: it was cut short "
            "on its way, or something else was sent. Start the same command again"
        ) from e
    finally:
        socket.setdefaulttimeout(before)


def get(name: str, folder: Path, *, size: str) -> None:
    """Make `folder`. Raises UsageError if it holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty; choose another folder or remove it. If it is the data set "
            f"already: {_pack_command(name, folder)}"
        )
    staging = folder.with_name(f"{folder.name}.download")
    staging.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():  # archives stay; what was taken out of them may be a part only
        if path.is_dir():
            shutil.rmtree(path)
    made = get_imagenette(staging, size) if name == "imagenette" else get_cifar10(staging)
    made.rename(folder)
    shutil.rmtree(staging)


def _pack_command(name: str, folder: Path) -> str:
    return f"python shard.py {' '.join(_pack_arguments(name, folder))}"


def _pack_arguments(name: str, folder: Path) -> list[str]:
    return ["pack", str(folder), f"{folder}-shards", "--shard_size", SHARD_SIZES[name]]


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Get the data set, and pack it if that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("imagenette", "cifar10"))
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER", help="is made (default: data/ and name)"
    )
    parser.add_argument(
        "--size", choices=SIZES, help="of imagenette's shorter side (default: 160px)"
    )
    parser.add_argument("--pack", action="store_true", help="pack it, too, into FOLDER-shards")
    options = parser.parse_args(arguments)
    if options.size and options.name != "imagenette":
        raise UsageError(f"--size {options.size}: only imagenette comes in sizes")
    folder = options.folder or Path("data") / options.name
    get(options.name, folder, size=options.size or SIZES[0])
    train, val = scan(folder / "train"), scan(folder / "val")
    print(
        f"{folder}: {len(train):,} training and {len(val):,} validation images of "
        f"{len(train.classes)} classes"
    )
    if not options.pack:
        print(f"  pack it:  {_pack_command(options.name, folder)}")
    elif status := shard.main(_pack_arguments(options.name, folder)):
        return int(status)
    root = "" if options.folder is None else f" data.root={folder}-shards"
    print(f"  train on it:  python train.py --config recipes/{options.name}.yaml{root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
