"""Scans an ImageFolder (SRC/<class>/.../<image>) into a stable list of samples."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sharding.errors import DataError, UsageError

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".webp"])
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Every image of one split: classes sorted by name, images sorted within their class."""

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    """Relative to the root, with forward slashes: n01440764/n01440764_10026.JPEG"""
    labels: npt.NDArray[np.uint32]
    """Index into `classes`, one a path."""
    sizes: npt.NDArray[np.int64]
    """Bytes of each file when it was listed."""
    ignored: int
    """Files passed over: hidden ones, and those without an image's extension."""

    def __len__(self) -> int:
        return len(self.paths)


def find_splits(source: Path) -> dict[str, Path]:
    """The splits under a folder: its train/ and val/, or else the folder itself as one split."""
    if not source.is_dir():
        raise UsageError(f"{source} is no folder; give an ImageFolder: SRC/train/<class>/<image>")
    found = {name: source / name for name in SPLITS if (source / name).is_dir()}
    return found or {source.resolve().name if source.resolve().name in SPLITS else "train": source}


def scan(root: Path, *, classes: Sequence[str] | None = None) -> Listing:
    """List all images below the class folders of `root`.

    `classes` fixes the label order (a validation split takes its training split's); without it
    the folders' names, sorted, are the classes. Symlinks are followed, loops are left out, files
    that are hidden or without an image's extension are counted as ignored.

    Raises UsageError for a folder without class folders or with a class that `classes` lacks,
    DataError for a class folder without images.
    """
    names = _class_folders(root)
    order = tuple(names if classes is None else classes)
    label_of = {name: label for label, name in enumerate(order)}
    unknown = [name for name in names if name not in label_of]
    if unknown:
        raise UsageError(
            f"{root} has the class {unknown[0]!r} (and {len(unknown) - 1} more) that the training "
            f"split's {len(order)} classes lack"
        )
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    ignored = 0
    for name in names:
        found = sorted(_walk(root / name, name, frozenset([_identity(root)])))
        images = [(path, size) for path, size in found if _is_image_name(path)]
        ignored += len(found) - len(images)
        if not images:
            raise DataError(
                f"class folder {root / name} has no image ({', '.join(sorted(EXTENSIONS))}; "
                f"{len(found)} other files); add some or remove the folder"
            )
        paths.extend(path for path, _ in images)
        sizes.extend(size for _, size in images)
        labels.extend([label_of[name]] * len(images))
    return Listing(
        root=root,
        classes=order,
        paths=paths,
        labels=np.array(labels, np.uint32),
        sizes=np.array(sizes, np.int64),
        ignored=ignored,
    )


def _class_folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{root} is no folder; give an ImageFolder: SRC/<class>/<image>"
        ) from error
    if not names:
        raise UsageError(f"{root} has no class folders; an ImageFolder is SRC/<class>/<image>")
    return names


def _walk(
    folder: Path, relative: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file below; `above` are the folders that we came through."""
    identity = _identity(folder)
    if identity in above:  # a symlink back to where we came from
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{relative}/{entry.name}"
            _check_utf8(path, folder)
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _walk(folder / entry.name, path, above | {identity})
            elif entry.is_file():
                yield path, entry.stat().st_size
            else:
                raise DataError(f"{folder / entry.name} is no file or a dangling link; remove it")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_image_name(path: str) -> bool:
    name = path.rpartition("/")[2]
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _check_utf8(name: str, folder: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a name in {folder} is not UTF-8: {os.fsencode(name)!r}; rename it"
        ) from error
