"""Layouts: where ImageNet's splits stand, and labels that are kept in a separate file."""

import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import DataError, UsageError
from sharding.layouts import find_splits, flat_labels, is_flat, read_classes
from sharding.manifest import Packing
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore
from tests.make_images import files_below, image, write_files

KAGGLE = "ILSVRC/Data/CLS-LOC"
CSV = "LOC_val_solution.csv"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# The first classes of the real table; by name they sort the other way round.
CLASSES = {1: "n02119789", 2: "n02100735", 1000: "n03255030"}
TABLE = "n02119789 1 kit_fox\nn02100735 2 English_setter\nn03255030 1000 dumbbell\n"
LABELS = (2, 1000, 1, 2)
SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"{name},{boxes}\n"
    for name, boxes in (
        ("ILSVRC2012_val_00000003", "n02119789 0 14 216 299 "),  # in any order
        ("ILSVRC2012_val_00000001", "n02100735 85 1 499 272 n02100735 131 0 499 254 "),
        ("ILSVRC2012_val_00000004", "n02100735 1 2 3 4"),
        ("ILSVRC2012_val_00000002", "n03255030 97 20 300 90 "),
    )
)
GROUND_TRUTH = "".join(f"{label}\n" for label in LABELS)


def image_name(number: int) -> str:
    """File name of a validation image."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


IMAGES = {image_name(i): b"%d" % i for i in range(1, len(LABELS) + 1)}
EXPECTED = {image_name(i): CLASSES[label] for i, label in enumerate(LABELS, 1)}


def flat(root: Path, files: Mapping[str, str | bytes], val: str = "val") -> Path:
    """A data set whose val is flat, and files beside it."""
    write_files(root / val, IMAGES)
    data = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    return write_files(root, data)


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


FIRST, *_, LAST = SOLUTION.splitlines(keepends=True)[1:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SOLUTION.replace(LAST, ""),
            r"4 images, .*csv 3 labels: the image .*0002\.JPEG has no lab",
        ),
        (SOLUTION + "other,n02119789 1 2 3 4\n", "csv 5 labels: there is no image other; restore"),
        (SOLUTION + FIRST, "line 6 of .*csv has the image 'ILSVRC2012_val_00000003' again"),
        (SOLUTION + "other,  \n", r"line 6 of .*csv has no image or no class: 'other', \[\]"),
        (SOLUTION + "other\n", "line 6 of .*csv has no image or no class: 'other'"),
        (SOLUTION.replace("ImageId", "Id"), "csv lacks the columns ImageId,PredictionString"),
        (SOLUTION.partition("\n")[2], "csv lacks the columns ImageId,PredictionString"),
        (SOLUTION + "x" * 200_000, "line 5 of .*csv is no CSV: field larger"),
        (SOLUTION.encode("utf-16"), "csv is not UTF-8 text .* save it as UTF-8"),
    ],
)
def test_a_solution_that_does_not_fit(tmp_path: Path, text: str | bytes, message: str) -> None:
    """Each image has one label and each label its image; the place is named."""
    root = flat(tmp_path, {CSV: text})
    with pytest.raises(DataError, match=message):
        flat_labels(root, root / "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GROUND_TRUTH + "1\n",
            "4 images, .*txt 5 labels: there is no image ILSVRC2012_val_00000005",
        ),
        (GROUND_TRUTH[:-2], r"txt 3 labels: the image ILSVRC2012_val_00000004\.JPEG has no label"),
        ("", "txt 0 labels: the image ILSVRC2012_val_00000001.JPEG has no label"),
        *[
            (GROUND_TRUTH[:-2] + bad, f"line 4 of .* is '{bad}', .*map_clsloc.*1 to 1000")
            for bad in ("0", "3", "-1", "1001", "1e2", "n02119789", "\u0661", "9" * 5)
        ],
    ],
)
def test_a_ground_truth_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    """One line an image, each a number that the table has."""
    root = flat(tmp_path, {TRUTH: text, "map_clsloc.txt": TABLE})
    with pytest.raises(DataError, match=message):
        flat_labels(root, root / "val")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            TABLE.replace(" 1 ", " 0 "),
            r"line 1 of .* is 'n02119789 0 kit_fox', not .* in 1\.\.1000",
        ),
        (TABLE.replace("1000", "1001"), "line 3 of .* is 'n03255030 1001 dumbbell', not"),
        (
            TABLE + "n01440764 tench, Tinca tinca\n",
            "line 4 of .* is 'n01440764 tench, Tinca tinca'",
        ),
        (TABLE + "n01440764 2 tench", "has a number or a wnid twice"),
        (TABLE + "n02119789 3 kit_fox", "has a number or a wnid twice"),
        ("\n", "is empty, or"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, table: str, message: str) -> None:
    """Numbers from 0, Kaggle's list of names, a number twice: each would give wrong labels."""
    root = flat(tmp_path, {TRUTH: GROUND_TRUTH, "map_clsloc.txt": table})
    with pytest.raises(DataError, match=message):
        flat_labels(root, root / "val")


def write_meta(path: Path, rows: list[tuple[int, str, int]], last: str = "num_children") -> None:
    """A meta.mat as the devkit's: a struct array of synsets, numbers, names and children."""
    scipy_io = pytest.importorskip("scipy.io")
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), (last, object)]
    synsets = np.array([(i, wnid, "a, b", n) for i, wnid, n in rows], dtype=fields)
    scipy_io.savemat(path, {"synsets": synsets.reshape(-1, 1)})


def test_meta_mat(tmp_path: Path) -> None:
    """The devkit's own table: leaves of the tree are classes, its inner synsets are not."""
    root = flat(tmp_path, {TRUTH: GROUND_TRUTH})
    leaves = [(number, wnid, 0) for number, wnid in CLASSES.items()]
    others = [(3, "n02084071", 5), (1001, "n00001740", 0)]
    write_meta(root / "meta.mat", [*leaves, *others])
    assert flat_labels(root, root / "val") == EXPECTED
    for number, _, _ in others:
        (root / TRUTH).write_text(f"1\n1\n{number}\n1\n")
        with pytest.raises(DataError, match=f"line 3 of .* is '{number}', which is no number of"):
            flat_labels(root, root / "val")


def test_meta_mat_of_one_class(tmp_path: Path) -> None:
    """A single synset comes as a scalar out of the file."""
    root = flat(tmp_path, {TRUTH: "1\n1\n1\n1\n"})
    write_meta(root / "meta.mat", [(1, CLASSES[1], 0)])
    assert set(flat_labels(root, root / "val").values()) == {CLASSES[1]}


def test_what_is_no_meta_mat(tmp_path: Path) -> None:
    """Text, an empty file, another struct, a missing file: one line that names the file."""
    root = flat(tmp_path, {TRUTH: GROUND_TRUTH, "meta.mat": TABLE, "empty.mat": ""})
    write_meta(root / "other.mat", [(1, "n02119789", 0)], last="children")
    for name in ("meta.mat", "empty.mat", "other.mat"):
        with pytest.raises(DataError, match=rf"{name} is no meta\.mat of the devkit"):
            flat_labels(root, root / "val", synsets=root / name)
    with pytest.raises(UsageError, match=r"cannot read .*gone\.mat: No such file"):
        flat_labels(root, root / "val", synsets=root / "gone.mat")


def test_meta_mat_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy is only needed here; without it the error says so, and what does without."""
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    root = flat(tmp_path, {TRUTH: GROUND_TRUTH, "meta.mat": b""})
    with pytest.raises(
        UsageError, match=r"meta\.mat needs SciPy: pip install scipy, or pass --syn"
    ):
        flat_labels(root, root / "val")
    write_files(root, {"map_clsloc.txt": TABLE.encode()})
    assert flat_labels(root, root / "val") == EXPECTED


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
    with pytest.raises(UsageError, match=r"the class 'n03255030' \(and 0 more\)"):
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


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("b\na\n", ("b", "a")),
        ("\ufeffb\r\n\r\n \na b\r\n", ("b", "a b")),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish\n", ("n01440764", "n01443537")),
        ("n01443537\nn01440764", ("n01443537", "n01440764")),
        ("n01440764 tench\nother fish\n", ("n01440764 tench", "other fish")),
        ("n02085620-Chihuahua\nn02085782-spaniel", ("n02085620-Chihuahua", "n02085782-spaniel")),
        ("n0144 a\nn014407641 b\n", ("n0144 a", "n014407641 b")),
    ],
)
def test_classes_of_a_file(tmp_path: Path, text: str, classes: tuple[str, ...]) -> None:
    """One a line in label order; of Kaggle's LOC_synset_mapping.txt the wnids."""
    (tmp_path / "classes").write_bytes(text.encode())
    assert read_classes(tmp_path / "classes") == classes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\na\n", "has the class 'a' twice"),
        (b"n01440764 tench\nn01440764 Tinca tinca\n", "has the class 'n01440764' twice"),
        (b"", "has no classes; write one a line"),
        (b"\xef\xbb\xbf\n\r\n", "has no classes"),
        (b"caf\xe9\n", "is not UTF-8 text"),
        ("a\n".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_classes_that_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    """A class twice, none at all, or another encoding."""
    (tmp_path / "classes").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / "classes")


def test_classes_of_no_file(tmp_path: Path) -> None:
    """A path that is missing, or a folder, is wrong use."""
    for path, reason in ((tmp_path / "x", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=f"cannot read {path}: {reason}"):
            read_classes(path)


@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r"), min_size=1)
        .filter(str.strip)
        .filter(lambda name: not name.startswith("\ufeff")),
        min_size=1,
        unique=True,
    )
)
def test_any_folder_name_is_a_class(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever a folder may be called, but for line breaks, can stand in a file of classes."""
    path = tmp_path_factory.getbasetemp() / "classes"
    path.write_bytes("\n".join(names).encode())
    assert read_classes(path) == tuple(names)
