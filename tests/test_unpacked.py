"""What is said of a place without a manifest: of each slip another remedy."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sharding.dataset import PackedSplit, open_splits
from sharding.errors import DataError
from sharding.manifest import MANIFEST_NAME
from sharding.s3 import S3Store
from sharding.store import LocalStore, open_store
from sharding.unpacked import unpacked
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_images import write_files
from tests.make_shards import data_set
from tests.s3_stores import put


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images and the shards of a data set in a folder that is the current one."""
    shutil.copytree(data_set(), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("data/images/train", r"it holds images: pack them \(python shard.py pack SRC DST\)"),
        ("data/images", "it holds images"),
        ("data/images/train/train", "no such folder; {here}/data/images/train holds images: pack"),
        ("data/shards", r"a whole data set lies in it \(train, val\); name data/shards itself"),
        ("data/shards/train/train", "data/shards/train is one split by itself; name the folder"),
        ("data/shards/trian/train", "no such folder; packed data near it: {here}/data/shards$"),
        ("data/shard/train", "no such folder; packed data near it: {here}/data/shards$"),
        ("data/shards/test", "no such folder; packed data near it: {here}/data/shards$"),
        ("data/images/tran", r"no such folder \(in {here}/data/images\)$"),
        ("data/images/train/ant/ant_0.JPEG/train", "no such folder: .*/ant_0.JPEG is a file$"),
        ("/nowhere/train", "no such folder$"),
        ("/train", "no such folder$"),
        ("data/images/train/ant/ant_0.JPEG", "it is a file"),
        ("empty", "nothing was packed there, or not to its end .*the same pack command again"),
        ("file:///nowhere", "no such folder$"),
        ("raw", "it holds images"),
        ("linked/train", "it holds images"),
        ("runs", "nothing was packed there"),
    ],
)
def test_places(here: Path, place: str, said: str) -> None:
    """Images, a folder too deep or too high, a slip of a finger, nothing at all."""
    (here / "empty").mkdir()
    write_files(here / "raw", {"ILSVRC2012_img_train.tar": b"", "train/n1.tar": b""})
    shutil.copytree(here / "data/images/train", here / "raw/train", dirs_exist_ok=True)
    write_files(here / "runs", {"base/curves.png": b"", "base/tables/confusion.png": b""})
    (here / "linked/train").mkdir(parents=True)
    for folder in (here / "data/images/train").iterdir():
        (here / "linked/train" / folder.name).symlink_to(folder)
    message = f"^{place} has no manifest.json: .*{said.format(here=here)}"
    with pytest.raises(DataError, match=message):
        PackedSplit.open(place)


def test_names_without_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name alone stands in the current folder, and what is said names that."""
    monkeypatch.chdir(here / "data/shards/train")
    assert unpacked("train").startswith(f"{here}/data/shards/train is one split by itself")
    shutil.rmtree(here / "data/shards/val")
    monkeypatch.chdir(here / "data/shards")
    assert unpacked("val").startswith(f"{here}/data/shards has train alone; shard.py pack")
    assert unpacked("/val") == "there is no such folder"


def test_one_split_alone(here: Path) -> None:
    """The validation split that was never packed, or whose packing was killed."""
    shutil.rmtree(here / "data/shards/val")
    assert "data/shards has train alone; shard.py pack makes both" in unpacked("data/shards/val/")
    (here / "data/shards/train" / MANIFEST_NAME).unlink()
    for place in ("data/shards/train", "data/shards"):
        assert "(start the same command again), or others made them" in unpacked(place)
    with pytest.raises(DataError, match=r"^empty holds no packed data set, .*: there is no such"):
        open_splits("empty")
    with pytest.raises(DataError, match=r"^data/shards/train/x holds .*: there is no such folder"):
        open_splits("data/shards/train/x")


def test_s3(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """The same there; a bucket's neighbours are not asked."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    assert unpacked(f"{folder}/train") == "nothing was packed there"
    put(S3Store(f"{folder}/train"), "train-000000.tar", b"half")
    assert unpacked(f"{folder}/train").startswith("there are tars")
    put(S3Store(f"{folder}/train"), MANIFEST_NAME, b"{}")
    assert unpacked(f"{folder}/val").startswith(f"{folder} has train alone")
    assert unpacked(f"{folder}/train/val").startswith(f"{folder}/train is one split by itself")
    opened = []

    def spy(url: str) -> Any:
        opened.append(url)
        return open_store(url)

    monkeypatch.setattr("sharding.unpacked.open_store", spy)
    unpacked(f"s3://{BUCKET}")
    assert opened
    assert all(url.startswith(f"s3://{BUCKET}") for url in opened)


def test_what_cannot_be_looked_into(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour that may not be listed does not hide what is said of the place itself."""
    (here / "empty").mkdir()

    def refuse(*_: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalStore, "open", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    assert unpacked("empty").startswith("nothing was packed there")
    assert unpacked("nothing").startswith("there is no such folder")
