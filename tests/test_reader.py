"""Reader: the packed bytes, or an error that names the place."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from loaders.reader import Opened, ShardReader
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.store import Blob, LocalStore, Store
from tests.make_shards import CLASSES, SAMPLES, copy_of_shards, data_set, open_shards


def test_reads_what_was_packed() -> None:
    """Every sample's bytes, label and size are those of its file in the ImageFolder."""
    reader = open_shards()
    numbers = np.arange(SAMPLES["train"])
    labels, widths, heights = reader.facts(numbers)
    assert sum(reader.counts) == len(numbers)
    assert len({reader.key(number) for number in numbers.tolist()}) == len(numbers)
    for number in numbers.tolist():
        path = data_set() / "images" / "train" / f"{reader.key(number)}.JPEG"
        assert reader.read(number) == path.read_bytes()
        assert CLASSES[labels[number]] == path.parent.name
        with Image.open(path) as image:
            assert (widths[number], heights[number]) == image.size


def test_a_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    """One flipped bit is a DataError of shard, offset and key; its neighbours can be read."""
    root = copy_of_shards(tmp_path)
    split = PackedSplit.open(str(root / "train"))
    offset, size = split.read_index(2).table[["offset", "size"]][3].tolist()
    with open(root / "train/train-000002.tar", "r+b") as tar:
        byte = os.pread(tar.fileno(), 1, offset + size // 2)[0]
        os.pwrite(tar.fileno(), bytes([byte ^ 1]), offset + size // 2)
    reader = ShardReader(split)
    number = sum(reader.counts[:2]) + 3
    place = f"{root}/train/train-000002.tar, offset {offset}, sample {reader.key(number)}: "
    with pytest.raises(DataError, match=f"^{place}the bytes were changed or damaged"):
        reader.read(number)
    for neighbour in (number - 1, number + 1):
        assert reader.read(neighbour) == open_shards().read(neighbour)


class FlakyBlob:
    """The first read of each place brings back a wrong byte."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._seen: set[int] = set()
        self.size = blob.size

    def read_at(self, offset: int, size: int) -> bytes:
        """See Blob."""
        data = bytearray(self._blob.read_at(offset, size))
        data[0] ^= offset not in self._seen
        self._seen.add(offset)
        return bytes(data)


class FlakyStore(LocalStore):
    """Opens FlakyBlobs."""

    def open(self, name: str, size: int | None = None) -> Blob:
        """See Store."""
        return FlakyBlob(super().open(name, size))


def test_a_wrong_read_is_read_again() -> None:
    """Bytes that arrive damaged once are read again and used: memory and wires err, too."""
    folder = data_set() / "shards/train"
    flaky = replace(PackedSplit.open(str(folder)), store=cast(Store, FlakyStore(folder)))
    assert ShardReader(flaky).read(9) == open_shards().read(9)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated tar", r"000000\.tar has 1000 bytes, the manifest says \d+"),
        ("missing tar", r"000000\.tar is missing; copy it again"),
        ("missing index", r"000000\.npy is missing; copy it again"),
        ("swapped index", r"000000\.npy was changed or damaged, or belongs to another tar"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: str, message: str) -> None:
    """A tar or index that is not the manifest's is a DataError at its first use."""
    root = copy_of_shards(tmp_path) / "train"
    tar, index = root / "train-000000.tar", root / "train-000000.npy"
    match damage:
        case "truncated tar":
            os.truncate(tar, 1000)
        case "missing tar":
            tar.unlink()
        case "missing index":
            index.unlink()
        case "swapped index":
            index.write_bytes(index.with_stem("train-000001").read_bytes())
    with pytest.raises(DataError, match=message):
        open_shards(root.parent).read(0)


def test_a_tar_cut_while_it_is_read(tmp_path: Path) -> None:
    """A tar that shrinks under an open reader is a DataError, not short bytes."""
    root = copy_of_shards(tmp_path)
    reader = open_shards(root)
    reader.read(0)
    os.truncate(root / "train/train-000000.tar", 1000)
    with pytest.raises(DataError, match=r"train-000000\.tar .*the file was truncated"):
        reader.read(6)


def test_a_reader_travels_without_its_open_files() -> None:
    """A reader that was used pickles as one that was not, and its copy reads the same."""
    reader = open_shards()
    before = pickle.dumps(reader)
    expected = [reader.read(number) for number in range(8)]
    assert pickle.dumps(reader) == before
    copy = pickle.loads(before)
    assert [copy.read(number) for number in range(8)] == expected
    assert (copy.counts, copy.digest, copy.classes) == (
        reader.counts,
        reader.digest,
        reader.classes,
    )


def test_indexes_are_read_when_needed(tmp_path: Path) -> None:
    """Opening a split and reading from one shard touches no other shard's index or tar."""
    root = copy_of_shards(tmp_path)
    for path in (root / "train").glob("train-00000[1-9].*"):
        path.unlink()
    assert open_shards(root).read(0) == open_shards().read(0)


def test_many_threads_open_a_shard_once() -> None:
    """Those that come while it is being opened wait for it; others do not wait for them."""
    opening, go_on = threading.Barrier(3), threading.Event()
    made: list[int] = []

    def open_one(shard: int) -> int:
        made.append(shard)
        if shard < 2:
            opening.wait(30)
            assert go_on.wait(30)
        return 10 * shard

    opened = Opened(open_one)
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(opened, shard) for shard in (0, 1, 0, 1, 0, 1)]
        opening.wait(30)  # both are being opened at the same time
        assert 0 not in opened
        assert opened(2) == 20
        go_on.set()
        assert [result.result() for result in results] == [0, 10, 0, 10, 0, 10]
    assert sorted(made) == [0, 1, 2]
    assert 0 in opened


def test_so_many_stay_open_and_a_failure_is_tried_again() -> None:
    """The one that was opened first is closed; what could not be opened is asked for anew."""
    made: list[int] = []

    def open_one(shard: int) -> int:
        made.append(shard)
        if made.count(shard) == 1 and shard == 5:
            raise OSError("gone")
        return shard

    opened = Opened(open_one, most=2)
    for shard in (0, 1, 0, 2, 1, 0):
        assert opened(shard) == shard
    assert made == [0, 1, 2, 0]
    with pytest.raises(OSError, match="gone"):
        opened(5)
    assert opened(5) == 5
