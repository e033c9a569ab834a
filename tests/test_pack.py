"""Packing: the same bytes for the same images and options, and what is refused."""

import gc
import itertools
import shutil
import subprocess
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

from sharding import tar
from sharding.errors import DataError, UsageError
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore
from tests.make_images import (
    files_below,
    image,
    image_folder,
    pack_folder,
    run_shard,
    write_files,
)
from tests.packers import OPTIONS, identities, put


@pytest.mark.parametrize("workers", ["1", "2"])
def test_same_input_same_bytes(
    images_48: Path, packed_48: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    """Another copy of the images, packed by the program, gives the same bytes in every file."""
    shutil.copytree(images_48, tmp_path / "copy")
    run = run_shard("pack", tmp_path / "copy", tmp_path / "out", *OPTIONS, workers)
    assert (run.returncode, run.stderr) == (0, "")
    assert files_below(tmp_path / "out/train") == packed_48


def test_every_reader_gives_the_folder_back(tmp_path: Path) -> None:
    """Stock webdataset, tarfile and GNU tar each give every image back, and its label."""
    files = {
        "n1/plain.JPEG": image(1),
        "n1/two.dots.jpg": image(2),
        "n1/100%.png": image(3, "PNG"),
        "n1/sub/deep.webp": image(4, "WEBP"),
        "été/ü ñ 日本.jpg": image(5),
        "__n__/__x__.jpg": image(6),
        f"n1/{'long' * 60}.jpg": image(7),
        "n2/n02105855_2933.JPEG": image(8, "PNG"),  # keeps its name and bytes
        "n2/cmyk.jpg": image(9, mode="CMYK"),
    }
    split = pack_folder(write_files(tmp_path / "in", files), tmp_path / "out", max_samples=4)
    names = [str(tmp_path / "out" / shard.url) for shard in split.manifest.shards]
    classes = split.manifest.classes
    labels = {path: b"%d" % classes.index(path.split("/")[0]) for path in files}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        samples = {tar.path_of(s["__key__"]): s for s in wds.WebDataset(names, shardshuffle=False)}
        gc.collect()
    assert len(samples) == len(files)
    for path, data in files.items():
        key, _, extension = path.rpartition(".")
        assert samples[key][extension.lower()] == data
        assert samples[key]["cls"] == labels[path]

    whole = files | {path.rpartition(".")[0] + ".cls": label for path, label in labels.items()}
    (tmp_path / "gnu").mkdir()
    for name in names:
        subprocess.run(["tar", "xf", name], cwd=tmp_path / "gnu", check=True)
        with tarfile.open(name) as archive:
            archive.extractall(tmp_path / "python", filter="data")
    for folder in ("gnu", "python"):
        assert {tar.path_of(n): d for n, d in files_below(tmp_path / folder).items()} == whole


def test_finished_data_set_is_left_alone(tmp_path: Path) -> None:
    """The same command on a finished data set succeeds and writes nothing anew."""
    source = image_folder(tmp_path / "in", {"a": 3})
    first = pack_folder(source, tmp_path / "out", max_samples=2)
    before = identities(tmp_path / "out")
    assert pack_folder(source, tmp_path / "out", max_samples=2).manifest == first.manifest
    assert identities(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda _: None, {"seed": 1}),
        (lambda _: None, {"max_samples": 1}),
        (lambda _: None, {"shard_bytes": 1 << 20}),  # the same shards, by other options
        (lambda root: write_files(root, {"in/a/new.jpg": image(99)}), {}),
        (lambda root: write_files(root, {"in/b/new.jpg": image(99)}), {}),
        (lambda root: put(root / "out/train-000000.tar", 700), {}),  # damage: not repaired silently
    ],
    ids=["seed", "samples", "size", "another image", "another class", "damage"],
)
def test_finished_data_set_is_not_overwritten(
    tmp_path: Path, change: Callable[[Path], object], options: dict[str, int]
) -> None:
    """Other options or images than those of a finished data set are refused; it stays as it is."""
    source = image_folder(tmp_path / "in", {"a": 3})
    pack_folder(source, tmp_path / "out", max_samples=2)
    change(tmp_path)
    before = identities(tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds a finished data set that .*or a damaged one"):
        pack_folder(source, tmp_path / "out", **{"max_samples": 2, **options})
    assert identities(tmp_path / "out") == before


def test_foreign_tars_are_not_touched(tmp_path: Path) -> None:
    """A folder with tars that were not packed there is refused and stays as it is."""
    write_files(tmp_path / "out", {"backup.tar": b"precious", "notes.txt": b"1"})
    before = identities(tmp_path / "out")
    with pytest.raises(UsageError, match="files that were not packed here"):
        pack_folder(image_folder(tmp_path / "in", {"a": 1}), tmp_path / "out")
    assert identities(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/notes.jpg": b"hello"}, r"/a/notes\.jpg is no JPEG, PNG or WebP image \(5 bytes"),
        ({"a/zero.jpg": b""}, r"/a/zero\.jpg is empty; repair"),
        ({"a/gif.png": image(0, "GIF")}, r"/a/gif\.png is no JPEG"),
        (
            {"a/x.jpg": image(1), "a/x.png": image(2, "PNG")},
            r"^/.*/a/x\.jpg and /.*/a/x\.png would share the key 'a/x'",
        ),
        (
            {"a/x.jpg": image(1), "a/x.JPG": image(2)},
            r"^/.*/a/x\.JPG and /.*/a/x\.jpg would share the key 'a/x'",
        ),
    ],
    ids=itertools.count(),
)
def test_bad_files(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    """A file that cannot be packed is named, and there is no data set until it is gone."""
    source = write_files(tmp_path / "in", {"a/good.jpg": image(0), **files})
    with pytest.raises(DataError, match=message):
        pack_folder(source, tmp_path / "out")
    assert not list(tmp_path.glob("out/[.m]*json*")) + list(tmp_path.glob("out/.tmp-*"))
    for name in files:
        (source / name).unlink()
    assert pack_folder(source, tmp_path / "out").manifest.samples == 1


def test_a_shared_key_in_a_flat_folder(tmp_path: Path) -> None:
    """The files are named where they stand, not by the class that a label gives them."""
    root = write_files(tmp_path / "in", dict.fromkeys(["x.jpg", "x.png"], b"1"))
    listing = scan(root, class_of={"x.jpg": "a", "x.png": "a"})
    message = f"^{root}/x.jpg and {root}/x.png would share the key 'a/x'"
    with pytest.raises(DataError, match=message):
        Job(listing=listing, store=LocalStore(tmp_path / "out"), split="val")


@pytest.mark.parametrize("change", [b"", image(0)[:-1], image(0) + b"1", None])
def test_file_changed_while_packing(tmp_path: Path, change: bytes | None) -> None:
    """A file that was emptied, cut, grew or went between the scan and its turn is named."""
    listing = scan(image_folder(tmp_path / "in", {"a": 1}))
    (tmp_path / "in/a/a_0.JPEG").unlink()
    write_files(tmp_path / "in", {} if change is None else {"a/a_0.JPEG": change})
    with pytest.raises(DataError, match=r"/a/a_0\.JPEG changed while packing"):
        pack(Job(listing=listing, store=LocalStore(tmp_path / "out"), split="train"), workers=1)


@pytest.mark.parametrize(("width", "found"), [(65_535, (65_535, 1)), (65_536, (0, 0))])
def test_size_of_an_image(tmp_path: Path, width: int, found: tuple[int, int]) -> None:
    """A PNG named .JPEG has a PNG's size; one wider than the index's 16 bits has an unknown one."""
    source = write_files(tmp_path / "in", {"a/x.JPEG": image(0, "PNG", size=(width, 1))})
    (row,) = pack_folder(source, tmp_path / "out").read_index(0).table
    assert (row["width"], row["height"]) == found
