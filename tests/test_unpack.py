"""Unpacking: the images come back byte for byte and name for name, and nothing lands elsewhere."""

import fcntl
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import tar
from sharding.adopt import adopt
from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
from sharding.store import LocalStore
from sharding.unpack import unpack
from tests.make_images import (
    ENVIRONMENT,
    files_below,
    image,
    image_folder,
    pack_folder,
    write_files,
)

part = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
part = part.filter(lambda p: len(p.encode()) < 200 and not p.startswith("."))
paths = st.builds("{}/{}.jpg".format, st.lists(part, min_size=1, max_size=3).map("/".join), part)


def adopted(root: Path, names: list[str], **options: Any) -> PackedSplit:
    """A split of one adopted tar with images of these names, labelled 0, 1, 0, 1, ..."""
    return adopted_tars(root, [names], **options)


def adopted_tars(root: Path, tars: list[list[str]], **options: Any) -> PackedSplit:
    """A split of adopted tars."""
    root.mkdir(exist_ok=True)
    urls = []
    for number, names in enumerate(tars):
        urls.append(str(root / f"{number}.tar"))
        with tarfile.open(urls[-1], "w") as archive:
            for i, name in enumerate(names):
                label = name.rpartition(".")[0] + ".cls"
                for member, data in ((name, image(10 * number + i)), (label, b"%d" % (i % 2))):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    store = LocalStore(root)
    defaults = {"split": "train", "classes": None, "label_key": "label", "workers": 1}
    return PackedSplit(store=store, manifest=adopt(urls, store, **(defaults | options)))


def test_image_folder(tmp_path: Path) -> None:
    """What was packed comes back, all names and bytes, in several shards and processes."""
    source = image_folder(tmp_path / "s", {"a": 5, "b.c": 3, "__d__": 2, "é %": 1})
    write_files(source, {"a/sub/x.y.jpg": image(77), "a/%2E.PNG": image(78, "PNG")})
    split = pack_folder(source, tmp_path / "p", max_samples=4)
    told: list[int] = []
    unpack(
        split, tmp_path / "new/out", workers=2, progress=lambda shard: told.append(shard.samples)
    )
    assert files_below(tmp_path / "new/out") == files_below(source)
    assert told == [4, 4, 4, 1]
    assert os.listdir(tmp_path / "new") == ["out"]


@settings(max_examples=25, deadline=None)
@given(st.sets(paths, min_size=1, max_size=5))
def test_names(names: set[str]) -> None:
    """Whatever a file may be called comes back under its name, or the packer refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            source = write_files(root / "s", {name: image(1) for name in names})
        except OSError:  # a file and a folder of one name
            return
        unpack(pack_folder(source, root / "p"), root / "out", workers=1)
        assert files_below(root / "out") == files_below(source)


def test_adopted(tmp_path: Path) -> None:
    """Names of adopted shards stay as they are, or are put below their classes' folders."""
    names = ["1.jpg", "%41/2.jpg", "./b/3.jpg", "a/4.jpg"]
    split = adopted(tmp_path / "p", names, classes=("a", "b"))
    unpack(split, tmp_path / "out", workers=1, encoded=False)
    images = [image(i) for i in range(4)]
    found = files_below(tmp_path / "out")
    assert found == dict(zip(["1.jpg", "%41/2.jpg", "b/3.jpg", "a/4.jpg"], images, strict=True))
    unpack(split, tmp_path / "classes", workers=1, encoded=False, by_class=True)
    placed = ["a/1.jpg", "b/%41/2.jpg", "a/b/3.jpg", "b/a/4.jpg"]
    assert files_below(tmp_path / "classes") == dict(zip(placed, images, strict=True))
    again = pack_folder(tmp_path / "classes", tmp_path / "again")
    assert (again.manifest.classes, again.manifest.samples) == (("a", "b"), 4)
    prefixed = adopted(tmp_path / "q", ["a/1.jpg", "b/2.jpg"], classes=("a", "b"))
    unpack(prefixed, tmp_path / "same", workers=1, encoded=False, by_class=True)
    assert set(files_below(tmp_path / "same")) == {"a/1.jpg", "b/2.jpg"}


@pytest.mark.parametrize(
    "name", ["%2E%2E/x.jpg", "%2Fetc/x.jpg", "a/%2E%2E%2F../x.jpg", "a%00.jpg"]
)
def test_encoded_names_lead_nowhere(name: str, tmp_path: Path) -> None:
    """A name that is harmless in the tar and leads out once decoded is refused."""
    split = adopted(tmp_path / "p", ["a/good.jpg", name])
    before = files_below(tmp_path)
    with pytest.raises(DataError, match=r"member '.*' at offset .* no path below a folder"):
        unpack(split, tmp_path / "out", workers=1)
    assert files_below(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["p"]


@pytest.mark.parametrize("name", ["..", "a/b", "", "/", "../x", "."])
def test_class_names_lead_nowhere(name: str, tmp_path: Path) -> None:
    """A class whose name is no name of a folder is refused."""
    split = adopted(tmp_path / "p", ["1.jpg"], classes=(name,))
    with pytest.raises(DataError, match=r"no path below a folder|can name no folder"):
        unpack(split, tmp_path / "out", workers=1, encoded=False, by_class=True)
    assert os.listdir(tmp_path) == ["p"]


@pytest.mark.parametrize(
    "tars",
    [
        [["a.jpg", "a.jpg/b.png"]],
        [["a.jpg/b.png", "a.jpg"]],
        [["a.jpg", "a.jpg/b/c.png"]],
        [["x/a.jpg"], ["y/a.jpg", "x/a.jpg"]],
        [["x/a.jpg", "./x/a.jpg"]],
    ],
)
def test_conflicts(tars: list[list[str]], tmp_path: Path) -> None:
    """Two samples of one path, or one that would be a file and a folder, are refused."""
    split = adopted_tars(tmp_path / "p", tars)
    with pytest.raises(DataError, match="another sample's file or folder has the name"):
        unpack(split, tmp_path / "out", workers=1, encoded=False)
    assert os.listdir(tmp_path) == ["p"]


def test_damage(tmp_path: Path) -> None:
    """A changed image, name, size or place is found before anything is given out."""
    split = pack_folder(image_folder(tmp_path / "s", {"a": 2}), tmp_path / "p")
    path = Path(split.where(0))
    data = path.read_bytes()
    index = split.read_index(0)
    offset, size = (int(index.table[name][1]) for name in ("offset", "size"))
    key = index.key(1)
    other = tar.header(f"{key}x.JPEG", size)
    short = tar.header(f"{key}.JPEG", size - 1)
    for at, new, message in (
        (offset + size // 2, bytes([data[offset + size // 2] ^ 1]), f"{key}.JPEG.* wrong bytes"),
        (offset - 512, other, f"{key}x.JPEG.* its header was changed"),
        (offset - 512, short, "its header was changed"),
        (offset - 512, b"?", "wrong checksum"),
        (offset - 512, tar.END, "goes on after its end marker"),
    ):
        path.write_bytes(data[:at] + new + data[at + len(new) :])
        with pytest.raises(DataError, match=message):
            unpack(split, tmp_path / "out", workers=1)
        assert sorted(os.listdir(tmp_path)) == ["p", "s"]
    path.write_bytes(data[: offset - 512] + bytes(len(data) - offset + 512))
    with pytest.raises(DataError, match=f"no member for the sample '{key}'"):
        unpack(split, tmp_path / "out", workers=1)


def test_targets(tmp_path: Path) -> None:
    """An empty folder is filled, a link to one too; what holds anything is left alone."""
    source = image_folder(tmp_path / "s", {"a": 1})
    split = pack_folder(source, tmp_path / "p")
    for name in ("empty", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    write_files(tmp_path, {"full/.hidden": b"1", "file": b"2"})
    unpack(split, tmp_path / "empty", workers=1)
    unpack(split, tmp_path / "link", workers=1)
    assert (
        files_below(tmp_path / "empty") == files_below(tmp_path / "linked") == files_below(source)
    )
    before = files_below(tmp_path)
    for name in ("full", "file", "empty"):
        with pytest.raises(UsageError, match="is not an empty folder"):
            unpack(split, tmp_path / name, workers=1)
    assert files_below(tmp_path) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_killed(tmp_path: Path) -> None:
    """A killed unpacking leaves no target; the same command starts over and completes it."""
    source = image_folder(tmp_path / "s", {"a": 40, "b": 40})
    split = pack_folder(source, tmp_path / "p", max_samples=20)
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from sharding.dataset import PackedSplit\nfrom sharding.unpack import unpack\n"
        "unpack(PackedSplit.open(sys.argv[1]), Path(sys.argv[2]), workers=1,\n"
        "       progress=lambda shard: (print('one', flush=True), time.sleep(60)))\n"
    )
    out = tmp_path / "out"
    line = [sys.executable, "-c", code, str(tmp_path / "p"), str(out)]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"one\n"
        with pytest.raises(UsageError, match="another process is unpacking"):
            unpack(split, out, workers=1)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    left = tmp_path / ".out.unpacking"
    assert files_below(left)
    write_files(left, {"a/stray.jpg": b"of another data set", "stray": b""})
    (left / "link").symlink_to(tmp_path / "s")
    wait_for_lock(left)
    unpack(split, out, workers=1)
    assert files_below(out) == files_below(source)
    assert sorted(os.listdir(tmp_path)) == ["out", "p", "s"]


def wait_for_lock(folder: Path) -> None:
    """Wait until the killed process's workers are gone too."""
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(100):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.05)
    os.close(descriptor)


def test_a_link_in_the_place_of_the_hidden_folder(tmp_path: Path) -> None:
    """A link that stands where we would write is not followed."""
    split = pack_folder(image_folder(tmp_path / "s", {"a": 1}), tmp_path / "p")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.unpacking").symlink_to("elsewhere")
    with pytest.raises(OSError, match="unpacking"):
        unpack(split, tmp_path / "out", workers=1)
    assert os.listdir(tmp_path / "elsewhere") == []
