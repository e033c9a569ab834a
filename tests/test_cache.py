"""The node's cache: what has a name is whole, whatever was killed; readers are never wrong."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loaders.cache import CachedReader, SegmentCache
from loaders.order import Order, OrderConfig, Segment
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.index import SampleIndex
from sharding.store import LocalBlob
from tests.make_shards import SAMPLES, copy_of_shards, data_set, open_shards

ALL = range(SAMPLES["train"])


def open_split(root: Path | None = None, split: str = "train") -> PackedSplit:
    """A packed split of the common data set, or of a copy of it."""
    return PackedSplit.open(f"{root or data_set() / 'shards'}/{split}")


def segments_of(split: PackedSplit, lanes: int = 3) -> list[Segment]:
    """All segments of the lanes of an order."""
    order = Order([shard.samples for shard in split.manifest.shards], OrderConfig(lanes=lanes))
    return [segment for lane in range(lanes) for segment in order.segments(lane)]


def read_all(cache: SegmentCache) -> tuple[list[bytes], int]:
    """Every sample's bytes, and how many came from the cache."""
    reader = CachedReader(cache, segments_of(cache.split))
    return [reader.read(number) for number in ALL], reader.cached


@pytest.fixture
def cache(tmp_path: Path) -> SegmentCache:
    """An empty cache of the training split."""
    return SegmentCache(tmp_path / "cache", open_split())


def test_cached_bytes_are_the_stores(cache: SegmentCache) -> None:
    """With none, some and all segments there, every sample is what the store has."""
    expected = [open_shards().read(number) for number in ALL]
    segments = segments_of(cache.split)
    assert read_all(cache) == (expected, 0)
    read = [cache.fill(segment) for segment in segments[:4]]
    assert min(read) > 0
    found, cached = read_all(cache)
    assert found == expected
    assert cached == sum(segment.last - segment.first for segment in segments[:4])
    assert sum(read) == sum(cache.sizes().values())
    assert cache.fill(segments[0]) == 0  # it is there
    for segment in segments[4:]:
        cache.fill(segment)
    assert read_all(pickle.loads(pickle.dumps(cache))) == (expected, len(ALL))


def test_splits_with_equal_file_names_do_not_meet(tmp_path: Path) -> None:
    """Two data sets whose shards have the same names have their own files in one cache."""
    other = copy_of_shards(tmp_path)
    for name in os.listdir(other / "train"):
        (other / "val" / name.replace("train", "val")).exists()
    for split in (open_split(), open_split(split="val")):
        cache = SegmentCache(tmp_path / "cache", split)
        for segment in segments_of(split):
            assert cache.fill(segment) > 0
    moved = SegmentCache(tmp_path / "cache", open_split(other))
    assert [moved.fill(segment) for segment in segments_of(moved.split)] == [0] * len(
        segments_of(moved.split)
    )  # the same data set at another place shares them


def test_damage_is_not_cached(tmp_path: Path) -> None:
    """A sample that is not what the index says is named, and nothing of the segment stays."""
    root = copy_of_shards(tmp_path)
    split = open_split(root)
    (first, *_) = segments_of(split)
    offset = int(split.read_index(first.shard).table["offset"][first.first])
    with open(f"{split.store.url}/{split.manifest.shards[first.shard].url}", "r+b") as tar:
        os.pwrite(tar.fileno(), b"\0\0\0\0", offset + 20)
    cache = SegmentCache(tmp_path / "cache", split)
    with pytest.raises(DataError, match=rf"\.tar, offset {offset}, sample .* changed or damaged"):
        cache.fill(first)
    assert [path.suffix for path in cache.folder.iterdir()] == [".npy"]


def test_rot_in_the_cache_is_not_read(cache: SegmentCache) -> None:
    """A cached file that lost its bytes, or was cut, goes; the sample comes from the store."""
    expected = [open_shards().read(number) for number in ALL]
    segments = segments_of(cache.split)
    for segment in segments:
        cache.fill(segment)
    for number, segment in enumerate(segments):
        path = cache.folder / cache.name(segment)
        if number % 2:
            path.write_bytes(bytes(path.stat().st_size))
        else:
            os.truncate(path, path.stat().st_size // 2)
    assert read_all(cache)[0] == expected
    (index, *_) = cache.folder.glob("*.npy")
    index.write_bytes(b"rot")
    fresh = SegmentCache(cache.folder.parent, cache.split)
    assert read_all(fresh)[0] == expected


FILL = """
import os, pickle, signal, sys
cache, segment = pickle.loads(bytes.fromhex(sys.argv[1]))
rename = os.rename
def stop(*names):
    print("filled", flush=True)
    signal.pause()
os.rename = stop
cache.fill(segment)
"""


def test_a_killed_filler_blocks_nobody(cache: SegmentCache) -> None:
    """While one process fills, another does not; after SIGKILL it does, and no part is left."""
    (segment, other, *_) = segments_of(cache.split)
    line = [sys.executable, "-c", FILL, pickle.dumps((cache, segment)).hex()]
    with subprocess.Popen(
        line, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    ) as filler:
        try:
            assert filler.stdout is not None
            assert filler.stdout.readline() == "filled\n"
            assert cache.fill(segment) == 0
            cache.sweep()
            assert len(list(cache.folder.glob(".part-*"))) == 2  # it is being filled: not swept
            assert cache.sizes() == {}
        finally:
            filler.send_signal(signal.SIGKILL)
    assert cache.fill(other) > 0
    assert len(list(cache.folder.glob(".part-*"))) == 2
    cache.sweep()
    assert not list(cache.folder.glob(".part-*"))
    assert cache.fill(segment) > 0
    assert len(cache.sizes()) == 2


def test_samples_that_are_read_before_are_not_fetched_again(
    cache: SegmentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pieces readers read by range, once; those samples are left out of the rest."""
    monkeypatch.setattr("loaders.cache._PIECE", 1)  # a request a sample
    monkeypatch.setattr("loaders.part._WAIT_S", 0.01)
    segment = max(segments_of(cache.split), key=lambda segment: segment.last - segment.first)
    facts = cache.index(segment.shard).table[segment.first : segment.last]
    start = sum(shard.samples for shard in cache.split.manifest.shards[: segment.shard])
    numbers = [start + row for row in range(segment.first, segment.last)]
    reader = CachedReader(cache, segments_of(cache.split))
    asked: list[int] = []
    real = LocalBlob.read_at

    def read_at(blob: LocalBlob, offset: int, size: int) -> bytes:
        asked.append(offset)
        data = real(blob, offset, size)
        if len(asked) == 2:  # of the filler; the first sample is there, the second not yet
            assert [reader.read(number) for number in numbers[:4]] == expected[:4]
            assert reader.cached == 1
            assert [reader.read(number) for number in numbers[:4]] == expected[:4]
            assert reader.cached == 1 + 4
        return data

    expected = [open_shards().read(number) for number in numbers]
    monkeypatch.setattr(LocalBlob, "read_at", read_at)
    fetched = cache.fill(segment)
    offsets = facts["offset"].tolist()
    assert sorted(asked) == sorted([*offsets, offsets[1]])  # the second was on its way twice
    assert fetched == facts["size"].sum() - facts["size"][2:4].sum()
    assert [reader.read(number) for number in numbers] == expected


def test_an_index_is_fetched_once(cache: SegmentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that need the same index at the same time wait for one of them."""
    calls = []
    real = PackedSplit.read_index

    def slow(split: PackedSplit, shard: int) -> SampleIndex:
        calls.append(shard)
        return real(split, shard)

    monkeypatch.setattr(PackedSplit, "read_index", slow)
    caches = [SegmentCache(cache.folder.parent, cache.split) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda one: one.index(1), caches))
    assert calls == [1]
    assert not list(cache.folder.glob(".part-*"))


def test_what_is_read_is_not_deleted(cache: SegmentCache) -> None:
    """A segment that a reader holds stays until the reader is done."""
    (segment, *_) = segments_of(cache.split)
    cache.fill(segment)
    with open(cache.folder / cache.name(segment), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert not cache.drop(segment)
        assert cache.sizes()
    assert cache.drop(segment)
    assert cache.sizes() == {}
    assert cache.drop(segment)


def test_a_full_disk_stops_nothing(cache: SegmentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written is an OSError for the filler, and nothing to readers."""
    expected = [open_shards().read(number) for number in ALL]

    def full(descriptor: int, data: bytes, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space"):
        cache.fill(segments_of(cache.split)[0])
    assert not [path for path in cache.folder.iterdir() if path.suffix != ".npy"]
    assert read_all(cache) == (expected, 0)


def test_what_cannot_be_read_here_is_read_from_the_store(cache: SegmentCache) -> None:
    """Another user's files, a failing disk: here folders stand where files should."""
    segments = segments_of(cache.split)
    cache.folder.mkdir(parents=True)
    for shard in cache.split.manifest.shards:
        (cache.folder / f"{shard.index_xxh128}.npy").mkdir()
    for segment in segments:
        (cache.folder / cache.name(segment)).mkdir()
    expected = [open_shards().read(number) for number in ALL]
    assert read_all(cache) == (expected, 0)
    assert not cache.drop(segments[0])


def test_nobody_waits_long_for_a_stopped_process(
    cache: SegmentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That holds the lock of an index."""
    monkeypatch.setattr("loaders.cache._WAIT_S", 0.1)
    cache.folder.mkdir(parents=True)
    name = f"{cache.split.manifest.shards[0].index_xxh128}.npy"
    with (cache.folder / f".part-{name}").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert len(cache.index(0).table) == cache.split.manifest.shards[0].samples
