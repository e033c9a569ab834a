"""ImageNet as its users have it: where its splits stand, and labels kept in a separate file.

SRC/{train,val}/<class>/*.JPEG               class folders: folders say the label
SRC/ILSVRC/Data/CLS-LOC/{train,val}          Kaggle's: val is flat, its labels stand in
                                             SRC/LOC_val_solution.csv
SRC/{train,val}, val flat                    the devkit's ILSVRC2012_validation_ground_truth.txt
                                             has a number a line, map_clsloc.txt or meta.mat
                                             the class of each number
"""

import csv
import importlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sharding.errors import DataError, UsageError
from sharding.source import is_image_name

SPLITS = ("train", "val")
CLASSES = 1000  # of ILSVRC: what a ground truth's numbers count to

_LAYOUTS = ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
_DEVKITS = ("", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "devkit")
_LABEL_FILES = (
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "ILSVRC2015_clsloc_validation_ground_truth.txt",
)
_SYNSET_FILES = ("map_clsloc.txt", "meta.mat")
_WNID = re.compile(r"(n[0-9]{8})(?:[\s,]|$)")


def find_splits(source: Path) -> dict[str, Path]:
    """The splits under a folder, in ImageNet's layouts, or else the folder itself as one split."""
    if not source.is_dir():
        raise UsageError(f"{source} is no folder; give an ImageFolder: SRC/train/<class>/<image>")
    for layout in _LAYOUTS:
        found = {name: source / layout / name for name in SPLITS}
        broken = [path for path in found.values() if path.is_symlink() and not path.is_dir()]
        if broken:
            raise DataError(f"{broken[0]} is a link that leads to no folder; repair or remove it")
        found = {name: path for name, path in found.items() if path.is_dir()}
        if found:
            return found
    name = source.resolve().name
    return {name if name in SPLITS else "train": source}


def is_flat(folder: Path) -> bool:
    """Whether a split's images stand without class folders, so that they need `flat_labels`."""
    folders, images = _names(folder)
    return bool(images) and not folders


def flat_labels(
    source: Path, folder: Path, *, val_labels: Path | None = None, synsets: Path | None = None
) -> dict[str, str]:
    """The class of each image of a flat folder, a split of `source`, by file name.

    `val_labels` is a LOC_val_solution.csv or an ILSVRC2012_validation_ground_truth.txt, `synsets`
    the table that the latter needs. Without them they are looked for where Kaggle's archive and
    the devkit have them.

    Raises UsageError if a file is needed and not there, DataError for one that cannot be read as
    what it is, or whose labels are not those of exactly the folder's images.
    """
    places = _places(source, folder)
    file = val_labels or _first(places, _LABEL_FILES)
    if file is None:
        raise UsageError(
            f"{folder} has no class folders, and no labels were found for its images; pass "
            "--val_labels LOC_val_solution.csv, or --val_labels "
            "ILSVRC2012_validation_ground_truth.txt --synsets map_clsloc.txt (or meta.mat)"
        )
    text = _read_text(file)
    if "," in text.partition("\n")[0]:
        class_of = _solution(text, file)
    else:
        table = synsets or _first([file.parent, *places], _SYNSET_FILES)
        if table is None:
            raise UsageError(
                f"{file} has numbers of classes, and no table of their names was found; pass "
                "--synsets map_clsloc.txt (or meta.mat), both are in the devkit's data folder"
            )
        class_of = _ground_truth(text, file, _synsets(table), table)
    images = {name: os.path.splitext(name)[0] for name in _names(folder)[1]}
    counts = f"{folder} has {len(images)} images, {file} {len(class_of)} labels"
    for name in sorted(images):
        if images[name] not in class_of:
            raise DataError(f"{counts}: the image {name} has no label; are both of one data set?")
    left = sorted(class_of.keys() - images.values())
    if left:
        raise DataError(f"{counts}: there is no image {left[0]}; restore it or remove its label")
    return {name: class_of[stem] for name, stem in images.items()}


def read_classes(path: Path) -> tuple[str, ...]:
    """Classes in label order, one a line; of 'n01440764 tench, Tinca tinca' the wnid.

    If every line begins with a wnid only the wnids count, else whole lines, spaces included.
    """
    lines = [line for _, line in _lines(_read_text(path))]
    wnids = [_WNID.match(line) for line in lines]
    names = [match[1] for match in wnids if match]
    if len(names) < len(lines):
        names = lines
    if not names:
        raise DataError(f"{path} has no classes; write one a line")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{path} has the class {name!r} twice; a class has one label")
        seen.add(name)
    return tuple(names)


def _names(folder: Path) -> tuple[list[str], list[str]]:
    """Visible folders, and images, without a system call for each: listing them all is scan's."""
    _, folders, files = next(os.walk(folder), ("", [], []))
    visible = [name for name in folders if not name.startswith(".")]
    return visible, [name for name in files if is_image_name(name)]


def _places(source: Path, folder: Path) -> list[Path]:
    """Where label files may stand: in SRC, beside the split, above Kaggle's ILSVRC/Data/CLS-LOC."""
    above = folder.resolve().parents
    kaggle = folder.resolve().parent.name == "CLS-LOC"
    bases = [source, *above[: 4 if kaggle else 1]]
    return [base / devkit for base in bases for devkit in _DEVKITS]


def _first(places: Iterable[Path], names: tuple[str, ...]) -> Path | None:
    """The first of the names that stands in one of the places."""
    places = list(places)
    found = (place / name for name in names for place in places if (place / name).is_file())
    return next(found, None)


def _solution(text: str, file: Path) -> dict[str, str]:
    """LOC_val_solution.csv: the class is the first word of its boxes, 'n03995372 85 1 499 272'."""
    class_of: dict[str, str] = {}
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if not {"ImageId", "PredictionString"} <= set(reader.fieldnames or []):
            raise DataError(f"{file} lacks the columns ImageId,PredictionString of Kaggle's file")
        for row in reader:
            image, boxes = row["ImageId"], (row["PredictionString"] or "").split()
            where = f"line {reader.line_num} of {file}"
            if not image or not boxes:
                raise DataError(f"{where} has no image or no class: {image!r}, {boxes}")
            if image in class_of:
                raise DataError(f"{where} has the image {image!r} again; remove one of the lines")
            class_of[image] = boxes[0]
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {file} is no CSV: {error}") from error
    return class_of


def _ground_truth(text: str, file: Path, class_of: dict[int, str], table: Path) -> dict[str, str]:
    """One number of a class a line, in the order of the images' numbers."""
    labels: dict[str, str] = {}
    for image, (number, line) in enumerate(_lines(text), 1):
        value = line.strip()
        name = class_of.get(int(value)) if re.fullmatch("[0-9]{1,4}", value) else None
        if name is None:
            raise DataError(
                f"line {number} of {file} is {value[:40]!r}, which is no number of a class "
                f"in {table} (1 to {max(class_of)})"
            )
        labels[f"ILSVRC2012_val_{image:08d}"] = name
    return labels


def _synsets(path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, from a text table or from meta.mat."""
    rows = _meta_mat(path) if path.suffix == ".mat" else _text_table(path)
    table = dict(rows)
    if not table or len(set(table.values())) < len(rows):
        raise DataError(f"{path} is empty, or has a number or a wnid twice; take the devkit's file")
    return table


def _text_table(path: Path) -> list[tuple[int, str]]:
    rows = []
    for number, line in _lines(_read_text(path)):
        match = re.match(r"(n[0-9]{8})\s+([0-9]{1,4})(?:\s|$)", line)
        if not match or not 1 <= int(match[2]) <= CLASSES:
            raise DataError(
                f"line {number} of {path} is {line[:40]!r}, not a wnid and its number in "
                f"1..{CLASSES} as in 'n02119789 1 kit_fox'"
            )
        rows.append((int(match[2]), match[1]))
    return rows


def _meta_mat(path: Path) -> list[tuple[int, str]]:
    """The leaves of the devkit's tree of synsets, the rest are no classes."""
    try:
        matlab = importlib.import_module("scipy.io")  # not among our dependencies
    except ImportError as error:
        raise UsageError(
            f"reading {path} needs SciPy: pip install scipy, or pass --synsets map_clsloc.txt"
        ) from error
    stream = io.BytesIO(_read(path))
    try:
        synsets = np.atleast_1d(matlab.loadmat(stream, squeeze_me=True)["synsets"])
        numbers, wnids, children = (
            synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children")
        )
        rows = [
            (int(n), str(w)) for n, w, c in zip(numbers, wnids, children, strict=True) if c == 0
        ]
    except Exception as error:  # of every kind, by SciPy
        raise DataError(f"{path} is no meta.mat of the devkit: {error!r}") from error
    return [(number, wnid) for number, wnid in rows if 1 <= number <= CLASSES]


def _lines(text: str) -> list[tuple[int, str]]:
    """Number and text of each line that is not blank; a name may hold what str.splitlines cuts."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
