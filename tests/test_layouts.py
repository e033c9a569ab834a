"""Layouts: where ImageNet's splits stand, and labels that are kept in a separate file."""

import tarfile
from pathlib import Path

import pytest

from sharding.errors import DataError, UsageError
from sharding.layouts import find_splits, flat_labels, is_flat
from sharding.manifest import Packing
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore
from tests.make_imagenet import (
    CLASSES,
    CSV,
    EXPECTED,
    GROUND_TRUTH,
    IMAGES,
    KAGGLE,
    SOLUTION,
    TABLE,
    TRUTH,
    flat,
    image_name,
)
from tests.make_images import files_below, image, write_files


@pytest.mark.parametrize(
    ("source", "splits"),
    [
        ("both", {"train": "both/train", "val": "both/val"}),
        ("other/../both/val/.", {"val": "both/val"}),  # one split, by its own name
        ("other", {"train": "other"}),  # any other folder is a training split
        *[
            (above, {"train": f"kaggle/{KAGGLE}/train", "val": f"kaggle/{KAGGLE}/val"})
            for above in ("kaggle", "kaggle/ILSVRC", "kaggle/ILSVRC/Data", f"kaggle/{KAGGLE}")
        ],
        (f"kaggle/{KAGGLE}/val", {"val": f"kaggle/{KAGGLE}/val"}),
    ],
)
def test_splits(tmp_path: Path, source: str, splits: dict[str, str]) -> None:
    """A folder holds train/ and val/, directly or as Kaggle has them, or is one split itself."""
    kaggle = [f"kaggle/{KAGGLE}/{split}/x" for split in ("train", "val", "test")]
    write_files(tmp_path, dict.fromkeys(["both/train/x", "both/val/x", "other/x", *kaggle], b""))
    found = {name: path.resolve() for name, path in find_splits(tmp_path / source).items()}
    assert found == {name: tmp_path / path for name, path in splits.items()}


def test_a_folder_too_high_is_no_split(tmp_path: Path) -> None:
    """Its folders are data sets, no classes; a class may have a folder `train` of images."""
    write_files(tmp_path, {"high/imagenet/train/n1/x.jpg": b"", "ok/railway/train/x.jpg": b""})
    with pytest.raises(UsageError, match=r"high/imagenet has train/ or val/ with folders in it"):
        find_splits(tmp_path / "high")
    assert find_splits(tmp_path / "ok") == {"train": tmp_path / "ok"}


def test_splits_of_other_names_are_no_classes(tmp_path: Path) -> None:
    """They are named, with what to call them; a class may well be called `test`."""
    write_files(tmp_path, {"in/training/n1/x.jpg": b"", "in/Validation/n1/x.jpg": b""})
    with pytest.raises(UsageError, match=r"the folders Validation, training, which look like spl"):
        find_splits(tmp_path / "in")
    write_files(tmp_path, {"ok/test/x.jpg": b"", "ok/exam/x.jpg": b""})
    assert find_splits(tmp_path / "ok") == {"train": tmp_path / "ok"}


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    """A missing source is wrong use; a split that is a dangling link is not passed over."""
    with pytest.raises(UsageError, match=r"nothing is no folder; give an ImageFolder"):
        find_splits(tmp_path / "nothing")
    write_files(tmp_path, {"val/a/1.jpg": b""})
    (tmp_path / "train").symlink_to("/mnt/not/mounted")
    with pytest.raises(DataError, match=r"/train is a link that leads to no folder"):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["1.jpg"], True),
        (["1.jpg", ".git/1.jpg", "labels.txt"], True),
        (["1.jpg", "a/2.jpg"], False),
        (["a/2.jpg"], False),
        (["labels.txt", ".1.jpg"], False),
    ],
)
def test_is_flat(tmp_path: Path, files: list[str], expected: bool) -> None:
    """Images without a single visible folder; anything else is for scan to accept or refuse."""
    assert is_flat(write_files(tmp_path, dict.fromkeys(files, b""))) is expected


@pytest.mark.parametrize(
    ("val", "files", "source"),
    [
        *[
            (f"{KAGGLE}/val", {CSV: SOLUTION}, above)
            for above in ("", "ILSVRC", "ILSVRC/Data", KAGGLE, f"{KAGGLE}/val")
        ],
        (f"{KAGGLE}/val", {"ILSVRC/" + CSV: SOLUTION}, ""),
        (f"{KAGGLE}/val", {f"{KAGGLE}/{CSV}": SOLUTION}, ""),
        ("val", {CSV: SOLUTION}, ""),
        ("val", {CSV: SOLUTION.replace("\n", "\r\n")}, "val"),
        ("val", {CSV: "\ufeff" + SOLUTION}, ""),
        ("val", {CSV: SOLUTION.replace("String\n", "String,Usage\n")}, ""),
        *[
            ("val", {f"{kit}{TRUTH}": GROUND_TRUTH, f"{kit}map_clsloc.txt": TABLE}, "")
            for kit in ("", "ILSVRC2012_devkit_t12/data/", "devkit/data/")
        ],
        (
            f"{KAGGLE}/val",
            {
                f"ILSVRC/devkit/data/{name}": text
                for name, text in (
                    ("ILSVRC2015_clsloc_validation_ground_truth.txt", GROUND_TRUTH),
                    ("map_clsloc.txt", TABLE),
                )
            },
            "ILSVRC",
        ),
        (
            "val",
            {TRUTH: GROUND_TRUTH.replace("\n", "\r\n"), "devkit/data/map_clsloc.txt": TABLE},
            "",
        ),
        ("val", {CSV: SOLUTION, TRUTH: "no table is needed"}, ""),
    ],
)
def test_labels_are_found(tmp_path: Path, val: str, files: dict[str, str], source: str) -> None:
    """In the places that archives have, whichever of their folders is given."""
    flat(tmp_path, files, val)
    assert flat_labels(tmp_path / source, tmp_path / val) == EXPECTED


def test_labels_are_found_where_links_lead(tmp_path: Path) -> None:
    """A source that is a link, or has one in it: its own place counts, and the real folder's."""
    flat(tmp_path / "disk", {CSV: SOLUTION}, f"{KAGGLE}/val")
    (tmp_path / "link").symlink_to(f"disk/{KAGGLE}")
    assert flat_labels(tmp_path / "link", tmp_path / "link/val") == EXPECTED
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "disk" / CSV).rename(source / CSV)
    (source / "ILSVRC").symlink_to("../disk/ILSVRC")
    assert flat_labels(source, source / KAGGLE / "val") == EXPECTED


def test_labels_above_another_layout_are_not_taken(tmp_path: Path) -> None:
    """Only above Kaggle's own folders: what lies above other data sets is not theirs."""
    flat(tmp_path, {CSV: SOLUTION}, "a/b/val")
    with pytest.raises(UsageError, match="no labels were found"):
        flat_labels(tmp_path / "a/b", tmp_path / "a/b/val")


def test_files_that_are_given_win(tmp_path: Path) -> None:
    """Over those that would be found; a file is what it holds, whatever its name."""
    files = {CSV: "rubbish", "map_clsloc.txt": "rubbish", "truth": GROUND_TRUTH, "table": TABLE}
    files |= {"kit/truth": GROUND_TRUTH, "kit/map_clsloc.txt": TABLE, "solution": SOLUTION}
    root = flat(tmp_path, files)
    given_files = {"val_labels": root / "truth", "synsets": root / "table"}
    assert flat_labels(root, root / "val", **given_files) == EXPECTED
    assert flat_labels(root, root / "val", val_labels=root / "solution") == EXPECTED
    assert flat_labels(root, root / "val", val_labels=root / "kit/truth") == EXPECTED


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """A flat val without labels, numbers without their table, a file that is not there."""
    root = flat(tmp_path, {})
    message = r"/val has no class folders, .* --val_labels LOC_val_solution\.csv, or .*--synsets"
    with pytest.raises(UsageError, match=message):
        flat_labels(root, root / "val")
    flat(tmp_path, {TRUTH: GROUND_TRUTH})
    with pytest.raises(UsageError, match=r"no table of their names .* --synsets map_clsloc\.txt"):
        flat_labels(root, root / "val")
    for given_files in ({"val_labels": root / "x"}, {"synsets": root / "x"}):
        with pytest.raises(UsageError, match=r"cannot read .*/x: No such file"):
            flat_labels(root, root / "val", **given_files)


def test_other_files_in_val_need_no_label(tmp_path: Path) -> None:
    """What scan ignores has none; an image under another extension is known by its number."""
    root = flat(tmp_path, {CSV: SOLUTION, "val/notes.txt": "x", "val/.x.jpg": "x"})
    (root / "val" / image_name(2)).rename(root / "val/ILSVRC2012_val_00000002.png")
    labels = flat_labels(root, root / "val")
    assert labels.pop("ILSVRC2012_val_00000002.png") == CLASSES[1000]
    assert labels == {name: wnid for name, wnid in EXPECTED.items() if name != image_name(2)}


def test_a_flat_val_lists_as_a_sorted_one(tmp_path: Path) -> None:
    """Samples, order and labels are the same, also where train has classes that val has not."""
    root = flat(tmp_path, {CSV: SOLUTION})
    train = sorted({*CLASSES.values(), "n01440764"})
    write_files(root, {f"train/{wnid}/{wnid}_1.JPEG": b"1" for wnid in train})
    write_files(root / "sorted", {f"{EXPECTED[name]}/{name}": IMAGES[name] for name in IMAGES})
    classes = scan(root / "train").classes
    listing = scan(root / "val", classes=classes, class_of=flat_labels(root, root / "val"))
    other = scan(root / "sorted", classes=classes)
    assert (listing.paths, listing.classes) == (other.paths, tuple(train))
    assert listing.labels.tolist() == other.labels.tolist() == [1, 1, 2, 3]
    with pytest.raises(UsageError, match=r"the class 'n03255030' that is none"):
        scan(root / "val", classes=classes[:3], class_of=flat_labels(root, root / "val"))


def test_a_flat_val_packs_as_a_sorted_one(tmp_path: Path) -> None:
    """Byte for byte, so the data set is the same one; `tar xf` gives class folders either way."""
    images = {name: image(i) for i, name in enumerate(IMAGES)}
    write_files(tmp_path, {CSV: SOLUTION.encode()})
    root = write_files(tmp_path / "val", images)
    expected = {f"{EXPECTED[name]}/{name}": data for name, data in images.items()}
    listings = {
        "flat": scan(root, class_of=flat_labels(tmp_path, root)),
        "sorted": scan(write_files(tmp_path / "sorted", expected)),
    }
    packed = {}
    for name, listing in listings.items():
        store = LocalStore(tmp_path / "shards" / name)
        job = Job(listing=listing, store=store, split="val", packing=Packing(max_samples=3))
        packed[name] = pack(job, workers=1).digest, files_below(store.root)
    assert packed["flat"] == packed["sorted"]
    for shard in (tmp_path / "shards/flat").glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path / "unpacked", filter="data")
    found = files_below(tmp_path / "unpacked")
    assert {name: data for name, data in found.items() if not name.endswith(".cls")} == expected
