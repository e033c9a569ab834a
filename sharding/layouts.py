"""ImageNet as its users have it: where its splits stand, and labels kept in a separate file.

SRC/{train,val}/<class>/*.JPEG               class folders: folders say the label
SRC/ILSVRC/Data/CLS-LOC/{train,val}          Kaggle's: val is flat, its labels stand in
                                             SRC/LOC_val_solution.csv
SRC/{train,val}, val flat                    the devkit's ILSVRC2012_validation_ground_truth.txt
                                             has a number a line, map_clsloc.txt or meta.mat
                                             the class of each number
"""

import os
from pathlib import Path

from sharding.errors import DataError, UsageError
from sharding.labels import read_ground_truth, read_solution, read_synsets, read_text
from sharding.source import is_image_name

SPLITS = ("train", "val")
_SPLITS_ELSEWHERE = frozenset({"training", "valid", "validation", "dev", "test", "testing", "eval"})

_LAYOUTS = ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
_DEVKITS = ("", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "devkit")
_LABEL_FILES = (
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "ILSVRC2015_clsloc_validation_ground_truth.txt",
)
_SYNSET_FILES = ("map_clsloc.txt", "meta.mat")


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
    inner = sorted(_names(source)[0])
    if inner and {name.lower() for name in inner} <= _SPLITS_ELSEWHERE:
        raise UsageError(
            f"{source} has the folders {', '.join(inner)}, which look like splits; rename them: "
            "a data set here has train/ and val/"
        )
    for name in inner:
        if any(_names(source / name / split)[0] for split in SPLITS):
            raise UsageError(
                f"{source / name} has train/ or val/ with folders in it: is it the data set?"
            )
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
            "ILSVRC2012_validation_ground_truth.txt --synsets map_clsloc.txt (or meta.mat); if "
            "it is one class, give the folder that it is in"
        )
    text = read_text(file)
    if "," in text.partition("\n")[0]:
        class_of = read_solution(text, file)
    else:
        table = synsets or _first([file.parent, *places], _SYNSET_FILES)
        if table is None:
            raise UsageError(
                f"{file} has numbers of classes, and no table of their names was found; pass "
                "--synsets map_clsloc.txt (or meta.mat), both are in the devkit's data folder"
            )
        class_of = read_ground_truth(text, file, read_synsets(table), table)
    images = {name: os.path.splitext(name)[0] for name in _names(folder)[1]}
    counts = f"{folder} has {len(images)} images, {file} {len(class_of)} labels"
    for name in sorted(images):
        if images[name] not in class_of:
            raise DataError(f"{counts}: the image {name} has no label; are both of one data set?")
    left = sorted(class_of.keys() - images.values())
    if left:
        raise DataError(f"{counts}: there is no image {left[0]}; restore it or remove its label")
    return {name: class_of[stem] for name, stem in images.items()}


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


def _first(places: list[Path], names: tuple[str, ...]) -> Path | None:
    """The first of the names that stands in one of the places."""
    found = (place / name for name in names for place in places if (place / name).is_file())
    return next(found, None)
