"""Source: class folders, or a flat folder with labels, as a stable list of samples."""

import os
import random
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import DataError, UsageError
from sharding.source import scan
from tests.make_images import write_files

# Names as file systems allow them: any text but / and NUL, not hidden, within 255 bytes.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8)
STEMS = NAMES.filter(lambda name: not name.startswith("."))
SAMPLES = st.dictionaries(
    st.builds(str.__add__, STEMS, st.sampled_from([".JPEG", ".jpg", ".JPG", ".png", ".webp"])),
    STEMS | st.sampled_from(["a", "a b", "a.b", "a-", "A"]),  # some sort around the slash
    min_size=1,
    max_size=8,
)


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


def test_what_is_no_image_is_ignored_and_counted(tmp_path: Path) -> None:
    """Hidden files and folders (each one), other extensions, images beside the class folders."""
    files = [
        "a/x.jpg",
        "a/.x.jpg",
        "a/notes.txt",
        "a/jpg",
        "a/x.jpg.txt",
        "b/d/Thumbs.db",
        "b/y.png",
    ]
    hidden = [".cache/x.jpg", ".cache/y.jpg", "a/.git/x.jpg"]
    beside = ["z.jpg", ".z.jpg", "README"]
    listing = scan(write_files(tmp_path, dict.fromkeys([*files, *hidden, *beside], b"1")))
    assert listing.paths == ["a/x.jpg", "b/y.png"]
    assert listing.ignored == 5 + 2 + 3


def test_every_extension_of_images_counts(tmp_path: Path) -> None:
    """Case does not matter, and nothing but the last extension."""
    images = ["a/1.JPEG", "a/2.jpg", "a/3.JPG", "a/4.png", "a/5.webp", "a/6.tar.jPeG"]
    others = ["a/7.gif", "a/8.bmp", "a/9.jpg~", "a/jpeg", "a/10.jpg.gz", "a/11.jp2"]
    listing = scan(write_files(tmp_path, dict.fromkeys([*images, *others], b"1")))
    assert (listing.paths, listing.ignored) == (images, len(others))


def test_what_the_packer_decides_is_listed(tmp_path: Path) -> None:
    """Empty files, the same content twice, two names that share a key: all are samples here."""
    files = {"a/1.jpg": b"", "a/2.jpg": b"same", "a/3.jpg": b"same", "a/3.png": b"other"}
    listing = scan(write_files(tmp_path, files))
    assert (listing.paths, listing.sizes.tolist()) == (list(files), [0, 4, 4, 5])


def test_names_stay_as_they_are(tmp_path: Path) -> None:
    """Dots, spaces, a line break, both unicode forms and both cases are names of their own."""
    name = "caf\u00e9"
    both = {form: unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    assert both["NFC"] != both["NFD"]
    files = [f"{both['NFC']}/x.jpg", f"{both['NFD']}/x.jpg", f"a b/{both['NFC']}.jpg"]
    files += [f"a b/{both['NFD']}.jpg", "a b/1.2.3.jpg", "a b/ 1 .jpg", "a b/line\nbreak.jpg"]
    files += ["A/x.jpg", "A/X.jpg", "a/x.jpg", "a/x.JPG"]
    listing = scan(write_files(tmp_path, {path: path.encode() for path in files}))
    assert sorted(listing.paths) == sorted(files)
    assert all((tmp_path / path).read_bytes() == path.encode() for path in listing.paths)
    assert listing.classes == ("A", "a", "a b", both["NFD"], both["NFC"])


def test_symlinks_are_followed_and_loops_end(tmp_path: Path) -> None:
    """Links are listed by their own names with their files' sizes; a link upwards is ignored."""
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
    assert listing.ignored == 2


def test_loops_over_two_folders_end(tmp_path: Path) -> None:
    """Folders that link to each other, and one to the root: each is entered once on a way down."""
    write_files(tmp_path, {"a/1.jpg": b"1", "b/2.jpg": b"2"})
    (tmp_path / "a/over").symlink_to("../b")
    (tmp_path / "b/back").symlink_to("../a")
    (tmp_path / "b/root").symlink_to("..")
    listing = scan(tmp_path)
    assert listing.paths == ["a/1.jpg", "a/over/2.jpg", "b/2.jpg", "b/back/1.jpg"]
    assert listing.ignored == 4


@pytest.mark.parametrize("name", ["a/y.jpg", "a/d/y.jpg", "b", "a/notes.txt"])
@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to("nothing"), lambda path: path.symlink_to(path.name), os.mkfifo],
    ids=["dangling", "itself", "pipe"],
)
def test_what_is_no_file_is_refused(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    """A dangling link or a pipe is named at once: none is skipped silently or waited for."""
    make(write_files(tmp_path, {"a/x.jpg": b"1", "a/d/x.jpg": b"1"}) / name)
    with pytest.raises(DataError, match=f"^{tmp_path / name} is no file or a dangling link"):
        scan(tmp_path)


def test_a_hidden_dangling_link_is_ignored(tmp_path: Path) -> None:
    """An editor's lock is such a link; what is hidden is not looked at."""
    (write_files(tmp_path, {"a/x.jpg": b"1"}) / "a/.#x.jpg").symlink_to("me@host.1")
    assert scan(tmp_path).ignored == 1


@pytest.mark.parametrize("files", [{}, {"b/notes.txt": b""}, {"b/.x.jpg": b""}], ids=str)
def test_empty_class_folder(tmp_path: Path, files: dict[str, bytes]) -> None:
    """A class folder without images is refused and named."""
    write_files(tmp_path, {"a/x.jpg": b"1", **files})
    (tmp_path / "b").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=rf"/b has no image .* {len(files)} other entries"):
        scan(tmp_path)


def test_labels_are_the_training_splits(tmp_path: Path) -> None:
    """A validation split keeps the training split's labels; a class that this lacks is refused."""
    write_files(tmp_path, {"a/1.jpg": b"1", "c/1.jpg": b"1"})
    listing = scan(tmp_path, classes=("c", "b", "a"))
    assert (listing.classes, listing.labels.tolist()) == (("c", "b", "a"), [2, 0])
    with pytest.raises(UsageError, match=r"'c' that is none of the 2 classes given"):
        scan(tmp_path, classes=("a", "b"))


@pytest.mark.parametrize(
    "name", [b"a/\xff.jpg", b"\xff/x.jpg", b"a/\xff/x.jpg", b"a/\xff.txt", b"\xff"]
)
def test_names_that_are_not_utf8(tmp_path: Path, name: bytes) -> None:
    """A name that no tar could carry as text is refused and shown as bytes."""
    write_files(tmp_path, {"a/x.jpg": b"1", os.fsdecode(name): b"1"})
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


def test_files_are_paths_where_folders_say_the_class(tmp_path: Path) -> None:
    """Not a copy: a million names are held once."""
    listing = scan(write_files(tmp_path, {"a/1.jpg": b"1"}))
    assert listing.files is listing.paths


@settings(max_examples=50, deadline=None)
@given(class_of=SAMPLES)
def test_a_flat_folder_lists_as_class_folders_do(class_of: dict[str, str]) -> None:
    """Whatever the names: paths, their order, labels and sizes are those of sorted folders."""
    data = {name: b"1" * number for number, name in enumerate(class_of)}
    with tempfile.TemporaryDirectory() as root:
        by_class = {f"{class_of[name]}/{name}": content for name, content in data.items()}
        folders = scan(write_files(Path(root, "sorted"), by_class))
        flat = scan(write_files(Path(root, "flat"), data), class_of=class_of)
        assert (flat.root / flat.files[-1]).read_bytes() == by_class[flat.paths[-1]]
    assert set(flat.paths) == set(by_class)
    assert (flat.paths, flat.classes) == (folders.paths, folders.classes)
    assert flat.labels.tolist() == folders.labels.tolist()
    assert flat.sizes.tolist() == folders.sizes.tolist() == [len(by_class[p]) for p in flat.paths]
    assert [path.rpartition("/")[2] for path in flat.paths] == flat.files


def test_a_flat_folder_has_the_training_splits_labels(tmp_path: Path) -> None:
    """A class may be without images there, but not unknown; hidden and other files are counted."""
    files = dict.fromkeys(["1.jpg", "2.jpg", ".3.jpg", "labels.csv", ".git/x.jpg"], b"1")
    root = write_files(tmp_path, files)
    class_of = {"1.jpg": "c", "2.jpg": "a", "labels.csv": "a", "gone.jpg": "zebra"}
    listing = scan(root, classes=("c", "b", "a"), class_of=class_of)
    assert (listing.classes, listing.ignored) == (("c", "b", "a"), 3)
    assert list(zip(listing.paths, listing.labels, strict=True)) == [("a/2.jpg", 2), ("c/1.jpg", 0)]
    with pytest.raises(UsageError, match=r"'c' that is none of the 2 classes given"):
        scan(root, classes=("a", "b"), class_of=class_of)


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "/etc", "a/b", ".hidden", "a\0b"])
def test_a_label_that_can_name_no_folder(tmp_path: Path, name: str) -> None:
    """A class out of a label file becomes a folder when shards are unpacked: it must be one."""
    write_files(tmp_path, {"1.jpg": b"1"})
    with pytest.raises(DataError, match=r"1\.jpg has the class '.*', which can name no folder"):
        scan(tmp_path, class_of={"1.jpg": name})


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], UsageError, "is not flat, .* has 0 images and 0 folders"),
        (["1.jpg", "a/1.jpg"], UsageError, "is not flat, .* has 1 images and 1 folders"),
        (["1.jpg", "2.jpg"], DataError, r"/2\.jpg has no label"),
    ],
)
def test_labels_that_do_not_fit_a_folder(
    tmp_path: Path, files: list[str], error: type[Exception], message: str
) -> None:
    """Labels from a file are for a flat folder, and for each image of it."""
    write_files(tmp_path, dict.fromkeys(files, b"1"))
    with pytest.raises(error, match=message):
        scan(tmp_path, class_of={"1.jpg": "a"})
