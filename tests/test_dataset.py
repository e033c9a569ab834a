"""PackedSplit: a data set as it lies in a store, and what is missing from it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.dataset import PackedSplit, open_splits
from sharding.errors import DataError
from sharding.manifest import MANIFEST_NAME
from tests.make_images import write_files


def test_index_leads_to_the_images(split: PackedSplit, tmp_path: Path) -> None:
    """The bytes at each row's place are those of the file with the row's key and class."""
    seen = {}
    for number in range(3):
        blob, index = split.open_tar(number), split.read_index(number)
        for i, row in enumerate(index.table):
            assert split.manifest.classes[row["label"]] == index.key(i).partition("/")[0]
            assert (row["width"], row["height"]) == (12, 9)
            seen[index.key(i)] = blob.read_at(int(row["offset"]), int(row["size"]))
    files = (tmp_path / "source").rglob("*.JPEG")
    assert seen == {f"{f.parent.name}/{f.stem}": f.read_bytes() for f in files}


def test_a_data_set_can_be_moved(split: PackedSplit, tmp_path: Path) -> None:
    """A copy elsewhere is the same data set; so is one whose shards have absolute URLs."""
    shutil.copytree(tmp_path / "packed", tmp_path / "copy")
    copy = PackedSplit.open(f"file://{tmp_path}/copy")
    copy.check_present()
    assert copy.manifest == split.manifest
    for shard in split.manifest.shards:
        (tmp_path / "copy" / shard.url).unlink()
    shards = tuple(replace(s, url=f"{tmp_path}/packed/{s.url}") for s in split.manifest.shards)
    linked = replace(copy, manifest=replace(split.manifest, shards=shards))
    linked.check_present()
    assert linked.where(1) == f"{tmp_path}/packed/train-000001.tar"
    assert linked.open_tar(1).size == split.manifest.shards[1].bytes


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-000001.tar", os.unlink, "is missing; copy it again"),
        (
            "train-000001.tar",
            lambda path: os.truncate(path, 100),
            "has 100 bytes, the manifest says",
        ),
        (
            "train-000002.tar",
            lambda path: os.truncate(path, 1 << 20),
            "has 1048576 bytes, the mani",
        ),
        ("train-000001.npy", os.unlink, "is missing; copy it again"),
    ],
)
def test_unfinished_copies(
    split: PackedSplit, name: str, damage: Callable[[str], None], message: str
) -> None:
    """A missing file or one of another size is named by the check at the start and at its use."""
    damage(f"{split.store.url}/{name}")
    use = split.read_index if name.endswith(".npy") else split.open_tar
    for find in (split.check_present, lambda: use(int(name[6:12]))):
        with pytest.raises(DataError, match=f"/packed/{name} {message}"):
            find()


def test_splits_of_a_data_set(split: PackedSplit, tmp_path: Path) -> None:
    """A URL is a split's, or that of the folder of train/ and val/; the unfinished do not count."""
    manifest = {MANIFEST_NAME: split.manifest.to_json().encode()}
    write_files(tmp_path / "both/train", manifest)
    write_files(tmp_path / "both/val", {"val-000000.tar": b""})
    assert open_splits(split.store.url).keys() == {"train"}
    assert open_splits(f"{tmp_path}/both/").keys() == {"train"}
    write_files(tmp_path / "both/val", manifest)
    assert open_splits(f"{tmp_path}/both").keys() == {"train", "val"}
    with pytest.raises(DataError, match=r"source holds no packed data set"):
        open_splits(str(tmp_path / "source"))
