"""Tars as others make them, and what is found in them once they are adopted."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from loaders.reader import ShardReader
from sharding.adopt import adopt
from sharding.dataset import PackedSplit
from sharding.manifest import Manifest
from sharding.store import LocalStore
from tests.make_images import image

JPG, PNG = image(1), image(2, "PNG")
GOOD = [("a/1.jpg", JPG), ("a/1.cls", b"3"), ("a/2.png", PNG), ("a/2.cls", b"1")]


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> str:
    """A tar of these files, in this order, as Python's tarfile writes it."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def index_tars(urls: list[str], destination: Path, **options: Any) -> Manifest:
    """Adopt with one worker."""
    defaults = {"split": "train", "classes": None, "label_key": "label", "workers": 1}
    return adopt(urls, LocalStore(destination), **(defaults | options))


def rows_of(split: PackedSplit) -> list[tuple[str, bytes, int, int, int]]:
    """Key, bytes, label, width and height of every sample, as the loader reads them."""
    reader = ShardReader(split)
    numbers = np.arange(split.manifest.samples)
    facts = zip(*(column.tolist() for column in reader.facts(numbers)), strict=True)
    return [(reader.key(i), reader.read(i), *fact) for i, fact in enumerate(facts)]
