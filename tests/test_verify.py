"""Verify: each kind of damage is reported where it is."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.dataset import PackedSplit
from sharding.verify import check_shard
from tests.make_images import image_folder, pack_folder, run_shard

TAR, INDEX = "train-000001.tar", "train-000001.npy"


@pytest.fixture
def split(tmp_path: Path) -> PackedSplit:
    """Six samples in three shards; the damage is done to shard 1."""
    source = image_folder(tmp_path / "source", {"a": 3, "b": 3})
    return pack_folder(source, tmp_path / "packed", max_samples=2)


def place(split: PackedSplit, row: int) -> tuple[int, int, str]:
    """First byte, size and key of a sample of shard 1."""
    index = split.read_index(1)
    return int(index.table["offset"][row]), int(index.table["size"][row]), index.key(row)


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file's byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def check(split: PackedSplit) -> list[str]:
    """What is wrong with shard 1; the other shards must be found whole."""
    assert check_shard(split, 0) == check_shard(split, 2) == []
    return check_shard(split, 1)


@pytest.mark.parametrize("row", [0, 1])
def test_image_byte(split: PackedSplit, row: int) -> None:
    """A changed byte of an image, the first or the last, is reported with shard, offset and key."""
    assert check(split) == []
    offset, size, key = place(split, row)
    for at in (offset, offset + size - 1):
        flip(Path(split.store.url, TAR), at)
        assert check(split) == [f"{split.where(1)}: wrong bytes at offset {offset}, sample {key}"]


@pytest.mark.parametrize(
    "at",
    [
        lambda split: place(split, 0)[0] - 512,  # a header's name
        lambda split: sum(place(split, 0)[:2]),  # padding behind an image
        lambda split: place(split, 1)[0] - 1024,  # a label's text
        lambda split: -1,  # the end of the tar
    ],
    ids=["header", "padding", "label", "end"],
)
def test_other_byte(split: PackedSplit, at: Callable[[PackedSplit], int]) -> None:
    """A changed byte outside the images is reported as such, with the shard."""
    flip(Path(split.store.url, TAR), at(split))
    (line,) = check(split)
    assert (
        line
        == f"{split.where(1)}: its headers, labels or padding were changed; all images are whole"
    )


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (TAR, lambda path: path.write_bytes(path.read_bytes()[:-512]), r"has \d+ bytes, the manif"),
        (TAR, lambda path: path.write_bytes(path.read_bytes() + b"1"), r"has \d+ bytes, the manif"),
        (TAR, Path.unlink, "is missing"),
        (INDEX, lambda path: flip(path, -1), "was changed or damaged"),
        (INDEX, lambda path: path.write_bytes(b""), "was changed or damaged"),
        (INDEX, Path.unlink, "is missing"),
    ],
)
def test_file(split: PackedSplit, name: str, damage: Callable[[Path], None], message: str) -> None:
    """A file that is truncated, lengthened, changed or missing is reported by its name."""
    damage(Path(split.store.url, name))
    (line,) = check(split)
    assert re.match(f"{split.store.url}/{name} {message}", line)


def test_command(split: PackedSplit) -> None:
    """`shard.py verify` has status 0 for what is whole; with status 3 it names all the damage."""
    whole = run_shard("verify", split.store.url, "--workers", "2")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.endswith("everything is as it was packed\n")
    for row in (0, 1):
        flip(Path(split.store.url, TAR), place(split, row)[0])
    Path(split.store.url, "train-000002.npy").unlink()
    damaged = run_shard("verify", split.store.url, "--workers", "2")
    lines = [*check_shard(split, 1), *check_shard(split, 2)]
    lines.append(f"shard.py: error: {split.store.url}: 3 problem(s), see above")
    assert (damaged.returncode, damaged.stderr.splitlines()) == (3, lines)
