"""What a place is that holds no packed split, and what to do about it: for the error's one line."""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from sharding.errors import DataError, UsageError
from sharding.layouts import SPLITS, find_splits
from sharding.manifest import MANIFEST_NAME
from sharding.source import is_image_name
from sharding.store import LocalStore, open_store

_TAR = re.compile(r".+-\d{6}\.tar")
"""How the packer names them; so do others."""
_LOOKED_INTO = 100
"""Folders, and entries of a folder, at most: this may be a network file system."""
_ENOUGH_IMAGES = 10
"""One or two pictures are no data set."""
_NEAR = 3
"""Data sets named at most."""

_HALF = (
    "there are tars, but their packing or copying was not finished (start the same command again), "
    "or others made them (shard.py index adopts them)"
)
_IMAGES = (
    "{where} holds images: pack them (python shard.py pack SRC DST); training also reads them as "
    "they are (data.format=imagefolder)"
)


def unpacked(url: str) -> str:
    """What stands at a path or URL instead of a packed split, or of train/ and val/ of them."""
    store = open_store(url)
    if isinstance(store, LocalStore):
        return _folder(store.root)
    above, _, name = store.url.rpartition("/")
    if not above.startswith("s3://"):  # it is a bucket
        above, name = "", store.url
    return _packed_nearby(store.url, above, name) or (
        _HALF if _has_tars(store.url) else "nothing was packed there"
    )


def _folder(folder: Path) -> str:
    """The same of a local folder."""
    whole = folder.absolute()
    if found := _packed_nearby(str(folder), str(whole.parent), whole.name):
        return found
    if not folder.exists():
        return f"there is no such folder{_near(folder)}"
    if not folder.is_dir():
        return "it is a file; a packed data set is a folder"
    if any(_has_tars(str(place)) for place in (folder, *(folder / split for split in SPLITS))):
        return _HALF
    if _holds_images(folder):
        return _IMAGES.format(where="it")
    return "nothing was packed there, or not to its end (then start the same pack command again)"


def _packed_nearby(place: str, above: str, name: str) -> str | None:
    """What is packed, but a folder further up or down, or beside. above: '' if there is nothing."""
    inner = [split for split in SPLITS if _is_packed(f"{place}/{split}")]
    if inner:
        return f"a whole data set lies in it ({', '.join(inner)}); name {place} itself"
    if not above:
        return None
    if _is_packed(above):
        return f"{above} is one split by itself; name the folder that holds its train/ and val/"
    others = [split for split in SPLITS if split != name and _is_packed(f"{above}/{split}")]
    if name in SPLITS and others:
        return (
            f"{above} has {others[0]} alone; shard.py pack makes both, of a folder with train/ "
            "and val/"
        )
    return None


def _is_packed(url: str) -> bool:
    """Whether a manifest is there, as far as that can be told."""
    try:
        open_store(url).open(MANIFEST_NAME)
    except (DataError, UsageError, OSError):  # a hint that cannot be had hides no error
        return False
    return True


def _has_tars(url: str) -> bool:
    try:
        store = open_store(url)
        names = _names(store.root) if isinstance(store, LocalStore) else store.sizes()
        return any(map(_TAR.fullmatch, names))
    except (DataError, UsageError, OSError):  # a hint, as above; often the folder is not there
        return False


def _names(folder: Path) -> Iterator[str]:
    """Of what stands in a folder, without a look at each."""
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries)


def _near(folder: Path) -> str:
    """What stands in the closest folder above that is there: what a slip of a finger hid."""
    parent = next((path for path in folder.absolute().parents if path.exists()), Path("/"))
    if not parent.is_dir():
        return f": {parent} is a file"
    if parent == Path("/"):
        return ""
    found = [str(place) for place in (parent, *_folders_in(parent)) if _is_data_set(place)]
    if found:
        return f"; packed data near it: {', '.join(found[:_NEAR])}"
    if folder.name in SPLITS and parent == folder.absolute().parent and _holds_images(parent):
        return f"; {_IMAGES.format(where=parent)}"
    return f" (in {parent})"


def _folders_in(parent: Path) -> Iterable[Path]:
    try:
        return [parent / name for name in sorted(islice(_names(parent), _LOOKED_INTO))]
    except OSError:  # may not be listed
        return []


def _is_data_set(folder: Path) -> bool:
    return any(_is_packed(str(folder / split)) for split in SPLITS)


def _holds_images(folder: Path) -> bool:
    """Whether the packer would find some there, in ImageNet's layouts or in class folders."""
    try:
        splits = find_splits(folder).values()
    except (DataError, UsageError, OSError):  # then the packer would find none, either
        return False
    walked = (
        place
        for split in splits
        for place in islice(os.walk(split, followlinks=True), _LOOKED_INTO)
    )
    images = (name for _, _, files in walked for name in files if is_image_name(name))
    return len(list(islice(images, _ENOUGH_IMAGES))) == _ENOUGH_IMAGES
