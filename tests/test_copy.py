"""Copying between stores: checked, resumable, and the same data set in the end."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import pytest

from sharding.adopt import adopt
from sharding.copy import copy
from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
from sharding.manifest import MANIFEST_NAME
from sharding.store import LocalStore, open_store
from sharding.verify import verify
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_images import files_below, image_folder, pack_folder


@pytest.fixture
def packed(tmp_path: Path) -> PackedSplit:
    """Five shards."""
    return pack_folder(
        image_folder(tmp_path / "in", {"a": 5, "b": 5}), tmp_path / "packed", max_samples=2
    )


def test_there_and_back_through_s3(
    packed: PackedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To S3 and from there to another folder: every byte as it was."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    there = open_store(f"s3://{BUCKET}/{tmp_path.name}/there")
    copy(packed, there, workers=2)
    remote = PackedSplit.open(there.url)
    assert [lines for _, lines in verify(remote, workers=1)] == [[]] * 5
    copy(remote, LocalStore(tmp_path / "back"), workers=1)
    assert files_below(tmp_path / "back") == files_below(tmp_path / "packed")


class Fragile(LocalStore):
    """A store that takes so many objects and no more."""

    def __init__(self, root: Path, left: int) -> None:
        super().__init__(root)
        self.left = left

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """See Store."""
        self.left -= 1
        if self.left < 0:
            raise OSError("no more")
        return super().create(name)


@pytest.mark.parametrize("writes", range(11))
def test_a_copy_that_stopped_goes_on(packed: PackedSplit, tmp_path: Path, writes: int) -> None:
    """What is there is kept, the rest is copied; the manifest comes last."""
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(OSError, match="no more"):
        copy(packed, Fragile(target, writes), workers=1)
    done = {path.name: path.stat().st_ino for path in target.iterdir()}
    assert len(done) == writes
    assert MANIFEST_NAME not in done
    copy(packed, LocalStore(target), workers=1)
    assert files_below(target) == files_below(tmp_path / "packed")
    assert done.items() <= {path.name: path.stat().st_ino for path in target.iterdir()}.items()


@pytest.mark.parametrize("name", ["train-000002.tar", "train-000002.npy"])
def test_damage_does_not_travel(packed: PackedSplit, tmp_path: Path, name: str) -> None:
    """A source that was changed is named and not copied; a damaged copy is made anew."""
    with open(tmp_path / "packed" / name, "r+b") as stream:
        before = os.pread(stream.fileno(), 1, 100)
        os.pwrite(stream.fileno(), bytes([before[0] ^ 1]), 100)
        with pytest.raises(DataError, match=f"/{name} was changed or damaged"):
            copy(packed, LocalStore(tmp_path / "out"), workers=1)
        assert not (tmp_path / "out" / name).exists()
        assert not (tmp_path / "out" / MANIFEST_NAME).exists()
        os.pwrite(stream.fileno(), before, 100)
    copy(packed, LocalStore(tmp_path / "out"), workers=2)
    (tmp_path / "out" / name).write_bytes(b"torn")
    copy(packed, LocalStore(tmp_path / "out"), workers=2)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "packed")


def test_another_data_set_is_not_overwritten(packed: PackedSplit, tmp_path: Path) -> None:
    """A target that holds other samples is refused, and both identities are named."""
    other = pack_folder(image_folder(tmp_path / "other", {"a": 1}), tmp_path / "out")
    before = files_below(tmp_path / "out")
    with pytest.raises(UsageError, match=f"{other.manifest.digest}, not {packed.manifest.digest}"):
        copy(packed, LocalStore(tmp_path / "out"), workers=1)
    assert files_below(tmp_path / "out") == before


def test_adopted_shards_come_along(packed: PackedSplit, tmp_path: Path) -> None:
    """Shards that lie elsewhere are beside the manifest afterwards; the data set is the same."""
    urls = [f"{packed.store.url}/{shard.url}" for shard in packed.manifest.shards]
    adopted = adopt(
        urls, LocalStore(tmp_path / "index"), split="train", classes=None, label_key="", workers=1
    )
    split = PackedSplit.open(str(tmp_path / "index"))
    copy(split, LocalStore(tmp_path / "out"), workers=1)
    found = PackedSplit.open(str(tmp_path / "out"))
    assert found.manifest.digest == adopted.digest
    assert [shard.url for shard in found.manifest.shards] == [
        f"train-{n:06d}.tar" for n in range(5)
    ]
    found.check_present()
