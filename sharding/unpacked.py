"""What a place is that holds no packed split, and what to do about it: for the error's one line."""

import os
from itertools import islice
from pathlib import Path

from sharding.errors import DataError, UsageError
from sharding.layouts import SPLITS
from sharding.manifest import MANIFEST_NAME
from sharding.source import is_image_name
from sharding.store import LocalStore, open_store

_FOLDERS = 100
"""Looked into for images."""
_NEAR = 3
"""Data sets named at most."""


def unpacked(url: str) -> str:
    """What stands at a path or URL instead of a packed split or data set."""
    place = url.rstrip("/") or "/"
    above, _, name = place.rpartition("/")
    inner = [f"{place}/{split}" for split in SPLITS]
    if any(file.endswith(".tar") for folder in (place, *inner) for file in _files(folder)):
        return (
            "there are tars, but their packing was not finished (start the same pack command "
            "again), or others made them (shard.py index adopts them)"
        )
    if _is_packed(above):
        return f"{above} is one split by itself; name the folder that holds its train/ and val/"
    others = [split for split in SPLITS if _is_packed(f"{above}/{split}")]
    if name in SPLITS and others:
        return (
            f"{above} has {others[0]} alone; shard.py pack makes both, of a folder with train/ "
            "and val/"
        )
    store = open_store(url)
    return _folder(store.root) if isinstance(store, LocalStore) else "nothing was packed there"


def _folder(folder: Path) -> str:
    """What a folder without tars is, if it is one."""
    if not folder.exists():
        return "there is no such folder" + _near(folder)
    if not folder.is_dir():
        return "it is a file; a packed data set is a folder"
    if _holds_images(folder):
        return (
            "it holds images: pack them (python shard.py pack SRC DST), or read them as they are "
            "(data.format=imagefolder)"
        )
    return "nothing was packed there, or not to its end (then start the same pack command again)"


def _files(url: str) -> list[str]:
    """Names of the files there, none where that cannot be told."""
    try:
        return list(open_store(url).sizes())
    except (DataError, UsageError, OSError):
        return []


def _is_packed(url: str) -> bool:
    return MANIFEST_NAME in _files(url)


def _near(folder: Path) -> str:
    """Packed data sets in the closest folder above that is there: what a slip of a finger hid."""
    parent = next((path for path in folder.absolute().parents if path.is_dir()), None)
    if parent is None or parent == Path("/"):
        return ""
    manifests = islice(sorted(parent.glob(f"*/*/{MANIFEST_NAME}")), 2 * _NEAR)
    found = dict.fromkeys(str(path.parents[1]) for path in manifests)
    if not found:
        return f" (in {parent})"
    return f"; packed data near it: {', '.join(islice(found, _NEAR))}"


def _holds_images(folder: Path) -> bool:
    walked = islice(os.walk(folder), _FOLDERS)
    return any(is_image_name(name) for _, _, files in walked for name in files)
