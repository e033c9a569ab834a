"""Files that give labels or their order: lists of classes, ground truths, tables of synsets.

a list of classes           n01440764 tench, Tinca tinca                  a class a line
LOC_val_solution.csv        ILSVRC2012_val_00000001,n01751748 85 1 499 272
..._ground_truth.txt        490                                           a number a line
map_clsloc.txt              n02119789 1 kit_fox                           the numbers' classes
meta.mat                    the same, as MATLAB has it
"""

import csv
import importlib
import io
import re
from pathlib import Path

import numpy as np

from sharding.errors import DataError, UsageError

CLASSES = 1000  # of ILSVRC: what a ground truth's numbers count to

_WNID = re.compile(r"(n[0-9]{8})(?:[\s,]|$)")


def read_classes(path: Path) -> tuple[str, ...]:
    """Classes in label order, one a line; of 'n01440764 tench, Tinca tinca' the wnid.

    If every line begins with a wnid only the wnids count, else whole lines, spaces included.
    """
    lines = [line for _, line in _lines(read_text(path))]
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


def read_solution(text: str, file: Path) -> dict[str, str]:
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


def read_ground_truth(
    text: str, file: Path, class_of: dict[int, str], table: Path
) -> dict[str, str]:
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


def read_synsets(path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, from a text table or from meta.mat."""
    rows = _meta_mat(path) if path.suffix == ".mat" else _text_table(path)
    table = dict(rows)
    if not table or len(set(table.values())) < len(rows):
        raise DataError(f"{path} is empty, or has a number or a wnid twice; take the devkit's file")
    return table


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark. Raises DataError if it is not UTF-8."""
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _text_table(path: Path) -> list[tuple[int, str]]:
    rows = []
    for number, line in _lines(read_text(path)):
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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
