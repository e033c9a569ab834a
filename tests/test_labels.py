"""Label files: read as what they are, or refused with the place."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import DataError, UsageError
from sharding.labels import read_classes
from sharding.layouts import flat_labels
from tests.make_imagenet import CLASSES, CSV, EXPECTED, GROUND_TRUTH, SOLUTION, TABLE, TRUTH, flat
from tests.make_images import write_files

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
