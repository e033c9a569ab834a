"""Source: an ImageFolder as a stable list of samples."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.errors import DataError, UsageError
from sharding.source import find_splits, scan
from tests.make_images import write_files


def test_listing(tmp_path: Path) -> None:
    """Classes are sorted by name, images within their class, with label and size of each."""
    files = {"b/2.jpg": b"12", "b/10.PNG": b"1", "B/x.jpeg": b"123", "a/sub/deep/y.WebP": b"1234"}
    listing = scan(write_files(tmp_path, files))
    assert (listing.classes, listing.ignored) == (("B", "a", "b"), 0)
    assert listing.paths == ["B/x.jpeg", "a/sub/deep/y.WebP", "b/10.PNG", "b/2.jpg"]
    assert listing.labels.tolist() == [0, 1, 2, 2]
    assert listing.sizes.tolist() == [3, 4, 1, 2]


def test_order_is_that_of_names(tmp_path: Path) -> None:
    """The order in which files were made, and so a file system's own, does not matter."""
    names = [f"{c}/{d}{i}.jpg" for c in "ab" for d in ("", "d/", "d.") for i in range(20)]
    one = scan(write_files(tmp_path / "one", dict.fromkeys(names, b"1")))
    random.Random(0).shuffle(names)
    other = scan(write_files(tmp_path / "other", dict.fromkeys(names, b"1")))
    assert one.paths == other.paths == sorted(names)


def test_other_files_are_ignored_and_counted(tmp_path: Path) -> None:
    """Hidden files and those without an image's extension are counted, hidden folders left out."""
    names = [
        "a/x.jpg",
        "a/.x.jpg",
        "a/notes.txt",
        "a/jpg",
        "a/x.jpg.txt",
        "b/d/Thumbs.db",
        "b/y.png",
    ]
    hidden = [".cache/x.jpg", "a/.git/x.jpg"]
    listing = scan(write_files(tmp_path, dict.fromkeys([*names, *hidden], b"1")))
    assert (listing.paths, listing.ignored) == (["a/x.jpg", "b/y.png"], 5)


def test_symlinks_are_followed_and_loops_end(tmp_path: Path) -> None:
    """Links are listed by their own names with their files' sizes; a link upwards adds nothing."""
    write_files(tmp_path, {"disk/1.jpg": b"123", "in/a/2.jpg": b"12", "in/a/d/4.jpg": b"1"})
    links = {
        "b": "../disk",
        "a/more": "../../disk",
        "a/3.jpg": "2.jpg",
        "a/loop": ".",
        "a/d/up": "..",
    }
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    listing = scan(tmp_path / "in")
    assert listing.paths == ["a/2.jpg", "a/3.jpg", "a/d/4.jpg", "a/more/1.jpg", "b/1.jpg"]
    assert listing.sizes.tolist() == [2, 2, 1, 3, 3]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nothing"), os.mkfifo])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A dangling link or a pipe is named at once: none is skipped silently or waited for."""
    make(write_files(tmp_path, {"a/x.jpg": b"1"}) / "a/y.jpg")
    with pytest.raises(DataError, match=r"a/y\.jpg is no file or a dangling link"):
        scan(tmp_path)


@pytest.mark.parametrize("files", [{}, {"b/notes.txt": b""}, {"b/.x.jpg": b""}], ids=str)
def test_empty_class_folder(tmp_path: Path, files: dict[str, bytes]) -> None:
    """A class folder without images is refused and named."""
    write_files(tmp_path, {"a/x.jpg": b"1", **files})
    (tmp_path / "b").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=rf"/b has no image .* {len(files)} other files"):
        scan(tmp_path)


def test_labels_are_the_training_splits(tmp_path: Path) -> None:
    """A validation split keeps the training split's labels; a class that this lacks is refused."""
    write_files(tmp_path, {"a/1.jpg": b"1", "c/1.jpg": b"1"})
    listing = scan(tmp_path, classes=("c", "b", "a"))
    assert (listing.classes, listing.labels.tolist()) == (("c", "b", "a"), [2, 0])
    with pytest.raises(UsageError, match=r"'c' \(and 0 more\) that the training split's 2 classes"):
        scan(tmp_path, classes=("a", "b"))


@pytest.mark.parametrize("name", [b"a/\xff.jpg", b"\xff/x.jpg", b"a/\xff/x.jpg", b"a/\xff.txt"])
def test_names_that_are_not_utf8(tmp_path: Path, name: bytes) -> None:
    """A name that no tar could carry as text is refused and shown as bytes."""
    write_files(tmp_path, {os.fsdecode(name): b"1"})
    with pytest.raises(DataError, match=r"is not UTF-8: b'.*\\xff"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [("nothing", "is no folder"), ("file/x.jpg", "is no folder"), ("flat", "has no class folders")],
)
def test_what_is_no_image_folder(tmp_path: Path, path: str, message: str) -> None:
    """A missing folder, a file, and a folder of bare images are refused with what is expected."""
    write_files(tmp_path, {"file/x.jpg": b"1", "flat/x.jpg": b"1"})
    with pytest.raises(UsageError, match=f"{path} {message}.*SRC/<class>/<image>"):
        scan(tmp_path / path)


@pytest.mark.parametrize(
    ("source", "splits"),
    [
        ("both", {"train": "both/train", "val": "both/val"}),
        ("other/../both/val/.", {"val": "both/val"}),  # one split, by its own name
        ("other", {"train": "other"}),  # any other folder is a training split
    ],
)
def test_splits(tmp_path: Path, source: str, splits: dict[str, str]) -> None:
    """A folder holds train/ and val/, or is one split itself."""
    write_files(tmp_path, dict.fromkeys(["both/train/x", "both/val/x", "other/x"], b""))
    found = {name: path.resolve() for name, path in find_splits(tmp_path / source).items()}
    assert found == {name: tmp_path / path for name, path in splits.items()}
