"""What is said of a place without a manifest: of each slip another remedy."""

import shutil
from pathlib import Path

import pytest

from sharding.dataset import PackedSplit, open_splits
from sharding.errors import DataError
from sharding.manifest import MANIFEST_NAME
from sharding.unpacked import unpacked
from tests.make_shards import data_set


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images and the shards of a data set in a folder that is the current one."""
    shutil.copytree(data_set(), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("data/images/train", "it holds images: pack them .*data.format=imagefolder"),
        ("data/images", "it holds images"),
        ("data/shards/train/train", "data/shards/train is one split by itself; name the folder"),
        ("data/shard/train", "no such folder; packed data near it: {here}/data/shards$"),
        ("data/shards/test", r"no such folder \(in {here}/data/shards\)$"),
        ("data/images/tran", r"no such folder \(in {here}/data/images\)$"),
        ("/nowhere/train", "no such folder$"),
        ("data/images/train/ant/ant_0.JPEG", "it is a file"),
        ("empty", "nothing was packed there, or not to its end .*the same pack command again"),
        ("file:///nowhere", "no such folder$"),
    ],
)
def test_places(here: Path, place: str, said: str) -> None:
    """Images, a folder too deep, a slip of a finger, nothing at all."""
    (here / "empty").mkdir()
    message = f"^{place} has no manifest.json: .*{said.format(here=here)}"
    with pytest.raises(DataError, match=message):
        PackedSplit.open(place)


def test_one_split_alone(here: Path) -> None:
    """The validation split that was never packed, or whose packing was killed."""
    shutil.rmtree(here / "data/shards/val")
    assert "data/shards has train alone; shard.py pack makes both" in unpacked("data/shards/val/")
    (here / "data/shards/train" / MANIFEST_NAME).unlink()
    for place in ("data/shards/train", "data/shards"):
        assert "start the same pack command again), or others made them" in unpacked(place)
    with pytest.raises(DataError, match=r"^data holds no packed data set, .*: it holds images"):
        open_splits("data")


def test_what_cannot_be_looked_into(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour that may not be listed does not hide what is said of the place itself."""
    (here / "empty").mkdir()

    def refuse(_: object) -> dict[str, int]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sharding.store.LocalStore.sizes", refuse)
    assert unpacked("empty").startswith("nothing was packed there")
