"""Verify: each kind of damage is reported where it is."""

import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sharding.dataset import PackedSplit
from sharding.errors import UsageError
from sharding.store import Blob
from sharding.verify import check_shard, verify
from tests.make_images import image_folder, pack_folder, run_shard

TAR, INDEX = "train-000001.tar", "train-000001.npy"


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


def damaged_rows(split: PackedSplit, share: float, seed: int = 0) -> set[str]:
    """What a check of a share of shard 1 finds."""
    return set(check_shard(split, 1, share=share, seed=seed))


def test_share(tmp_path: Path) -> None:
    """A share of the samples is drawn by the seed, the same each time, at least one a shard."""
    source = image_folder(tmp_path / "source", {"a": 20, "b": 20})
    split = pack_folder(source, tmp_path / "packed", max_samples=20)
    assert dict(verify(split, workers=2, share=0.3)) == {0: [], 1: []}
    for row in range(20):
        flip(Path(split.store.url, TAR), place(split, row)[0])
    everything = damaged_rows(split, 1)
    assert len(everything) == 20
    for share, count in ((1e-9, 1), (0.05, 1), (0.051, 2), (0.3, 6), (0.999, 20)):
        found = damaged_rows(split, share)
        assert (len(found), found == damaged_rows(split, share)) == (count, True)
        assert found <= everything
    assert damaged_rows(split, 0.3, seed=1) != damaged_rows(split, 0.3, seed=2)
    assert set().union(*(damaged_rows(split, 0.3, seed) for seed in range(40))) == everything
    (_, first), (_, second) = verify(split, workers=1, share=0.3, seed=5)
    assert (first, set(second)) == ([], damaged_rows(split, 0.3, seed=5))
    for row in range(20):
        flip(
            Path(split.store.url, "train-000000.tar"), int(split.read_index(0).table["offset"][row])
        )
    drawn = [
        [row for row in range(20) if any(split.read_index(i).key(row) in line for line in lines)]
        for i, lines in verify(split, workers=2, share=0.3)
    ]
    assert drawn[0] != drawn[1]  # other rows in each shard


def test_share_reads_only_its_samples(split: PackedSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tar only the drawn samples' bytes are read, but index and size are always checked."""
    read: list[int] = []

    class Counted:
        def __init__(self, blob: Blob) -> None:
            self.size = blob.size
            self._blob = blob

        def read_at(self, offset: int, size: int) -> bytes:
            read.append(size)
            return self._blob.read_at(offset, size)

    open_tar = PackedSplit.open_tar
    monkeypatch.setattr(PackedSplit, "open_tar", lambda *args: Counted(open_tar(*args)))
    assert check_shard(split, 1, share=0.5) == []
    assert read in [[place(split, row)[1]] for row in (0, 1)]
    flip(Path(split.store.url, INDEX), -1)
    (line,) = check_shard(split, 1, share=0.5)
    assert "was changed or damaged" in line
    with Path(split.store.url, "train-000000.tar").open("ab") as stream:
        stream.write(bytes(512))
    (line,) = check_shard(split, 0, share=0.5)
    assert re.search(r"has \d+ bytes, the manifest says", line)


@pytest.mark.parametrize("share", [0, -0.1, 1.001, float("nan")])
def test_wrong_share(split: PackedSplit, share: float) -> None:
    """A share that is none is refused with its value, as is a seed that is too large."""
    with pytest.raises(UsageError, match=f"got {share}"):
        list(verify(split, workers=1, share=share))
    with pytest.raises(UsageError, match="seed must be"):
        list(verify(split, workers=1, seed=1 << 64))


def test_memory(tmp_path: Path) -> None:
    """A tar is read in pieces: one with an image of 100 MB takes less than 10 MB, damaged too."""
    source = image_folder(tmp_path / "source", {"a": 1})
    large = source / "a/large.JPEG"
    large.write_bytes((source / "a/a_0.JPEG").read_bytes() + bytes(100_000_000))
    split = pack_folder(source, tmp_path / "packed")
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "packed", damaged)
    row = int(np.argmax(split.read_index(0).table["size"]))
    flip(damaged / "train-000000.tar", int(split.read_index(0).table["offset"][row]) + 10**8)
    tracemalloc.start()
    try:
        assert check_shard(split, 0) == []
        (line,) = check_shard(PackedSplit.open(str(damaged)), 0)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert line.endswith("sample a/large")


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
    lines.append(f"shard.py: error: {split.store.url}: 3 problems, see above")
    assert (damaged.returncode, damaged.stderr.splitlines()) == (3, lines)
