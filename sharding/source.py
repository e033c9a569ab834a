"""Scans one split (ROOT/<class>/.../<image>, or flat with labels) into a stable list of samples."""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sharding.errors import DataError, UsageError
from sharding.manifest import MANIFEST_NAME

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".webp"])

_Image = tuple[str, int]  # name or relative path, bytes
_Identity = tuple[int, int]  # device and inode of a folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Every image of one split: classes sorted by name, images sorted within their class."""

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    """The samples' names, <class>/.../<file>: n01440764/n01440764_10026.JPEG"""
    files: list[str]
    """Where each one's bytes stand, relative to the root: `paths` itself if that has classes."""
    labels: npt.NDArray[np.uint32]
    """Index into `classes`, one a path."""
    sizes: npt.NDArray[np.int64]
    """Bytes of each file when it was listed; an empty one is listed too."""
    ignored: int
    """What was passed over: whatever is hidden (a folder counts as one), files without an image's
    extension, images beside the class folders, links back to a folder that they stand in."""

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Folder:
    """What stands directly in a folder."""

    folders: list[str]
    images: list[_Image]
    ignored: int


def scan(
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    class_of: Mapping[str, str] | None = None,
) -> Listing:
    """List all images below the class folders of `root`, or with `class_of` those in it.

    `classes` fixes the label order (a validation split takes its training split's); without it
    the names of the classes found, sorted. `class_of` gives the class of each file of a flat
    folder (layouts.flat_labels); the same images listed from class folders give the same paths,
    order and labels. Symlinks are followed. Names stay as they are: neither case nor unicode form
    is changed, and the same content under two names is two samples.

    Raises UsageError for a folder without class folders or with a class that `classes` lacks,
    DataError for a class folder without images, a dangling link, a name that is not UTF-8, or an
    image that `class_of` lacks.
    """
    top = _top(root)
    ignored = top.ignored
    flat: dict[str, list[_Image]] = {}
    if class_of is not None:
        flat = _by_class(root, top, class_of)
    elif top.folders:
        ignored += len(top.images)
    else:
        packed = ", it is packed" if (root / MANIFEST_NAME).exists() else ""
        raise UsageError(
            f"{root} has no class folders{packed}; an ImageFolder is SRC/<class>/<image>"
        )
    names = sorted(flat or top.folders)
    order = tuple(names if classes is None else classes)
    label_of = {name: label for label, name in enumerate(order)}
    unknown = [name for name in names if name not in label_of]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if unknown[1:] else ""
        raise UsageError(
            f"{root} has the class {unknown[0]!r}{more} that is none of "
            f"the {len(order)} classes given, the training split's or those of --classes"
        )
    files: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for name in names:
        images, passed_over = (flat[name], 0) if flat else _class_folder(root, name)
        ignored += passed_over
        images.sort()
        files.extend([file for file, _ in images])
        sizes.extend([size for _, size in images])
        labels.extend([label_of[name]] * len(images))
    return Listing(
        root=root,
        classes=order,
        paths=files if class_of is None else [f"{class_of[file]}/{file}" for file in files],
        files=files,
        labels=np.array(labels, np.uint32),
        sizes=np.array(sizes, np.int64),
        ignored=ignored,
    )


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: not hidden, with an image's extension."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _top(root: Path) -> _Folder:
    try:
        return _read_folder(str(root))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{root} is no folder; give an ImageFolder: SRC/<class>/<image>"
        ) from error


def _by_class(root: Path, top: _Folder, class_of: Mapping[str, str]) -> dict[str, list[_Image]]:
    """The images of a flat folder by class."""
    if top.folders or not top.images:
        raise UsageError(
            f"{root} is not flat, as labels from a file need it: it has {len(top.images)} images "
            f"and {len(top.folders)} folders"
        )
    found: dict[str, list[_Image]] = {}
    for image in top.images:
        name = class_of.get(image[0])
        if name is None:
            raise DataError(f"{root / image[0]} has no label; give it one, or remove the image")
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise DataError(f"{root / image[0]} has the class {name!r}, which can name no folder")
        found.setdefault(name, []).append(image)
    return found


def _class_folder(root: Path, name: str) -> tuple[list[_Image], int]:
    """The images of one class, and how much was ignored."""
    images: list[_Image] = []
    ignored = _walk(root / name, name, frozenset([_identity(root)]), images)
    if not images:
        raise DataError(
            f"class folder {root / name} has no image ({', '.join(sorted(EXTENSIONS))}; "
            f"{ignored} other entries); add some or remove the folder"
        )
    return images, ignored


def _walk(folder: Path, relative: str, above: frozenset[_Identity], images: list[_Image]) -> int:
    """Add relative path and size of every image below, return how much was ignored.

    `above` are the folders that we came through: one that is met again is a loop.
    """
    identity = _identity(folder)
    if identity in above:
        return 1
    here = _read_folder(str(folder))
    images.extend([(f"{relative}/{name}", size) for name, size in here.images])
    return here.ignored + sum(
        _walk(folder / name, f"{relative}/{name}", above | {identity}, images)
        for name in here.folders
    )


def _read_folder(folder: str) -> _Folder:
    """One pass over a folder. Of all its files only images, and links, cost a system call."""
    folders: list[str] = []
    images: list[_Image] = []
    ignored = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not name.isascii():
                _check_utf8(name, folder)
            if name.startswith("."):
                ignored += 1
            elif _is(entry.is_dir):
                folders.append(name)
            elif not _is(entry.is_file):
                raise DataError(f"{entry.path} is no file or a dangling link; remove it")
            elif is_image_name(name):
                images.append((name, entry.stat().st_size))
            else:
                ignored += 1
    return _Folder(folders=folders, images=images, ignored=ignored)


def _is(test: Callable[[], bool]) -> bool:
    """Entry.is_dir or .is_file; False, as for other dangling links, for one that names itself."""
    try:
        return test()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _identity(folder: Path) -> _Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _check_utf8(name: str, folder: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a name in {folder} is not UTF-8: {os.fsencode(name)!r}; rename it"
        ) from error
