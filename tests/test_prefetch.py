"""Prefetch: what is fetched and deleted is what the plan says; training is never wrong."""

import errno
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.augment import AugmentConfig
from loaders.cache import SegmentCache
from loaders.demand import TrainingDemand
from loaders.loader import StreamingLoader
from loaders.order import Order, Segment
from loaders.prefetch import THREADS, CacheConfig, Fetcher, _Worker, decide
from loaders.reader import ShardReader
from loaders.topology import Topology
from loaders.validation import ValidationLoader
from sharding.dataset import PackedSplit
from sharding.errors import UsageError
from sharding.store import open_store
from tests.fault_proxy import BUCKET, FaultProxy, s3_endpoint
from tests.make_shards import GLOBAL_BATCH, ORDER, assert_equal, data_set, make_loader, open_shards

EVEN = 16
"""A global batch that gives each of 4 nodes lanes of its own."""

SEGMENTS = st.lists(st.integers(0, 30), unique=True, max_size=12).map(
    lambda numbers: [Segment(n, 0, 1, n) for n in numbers]
)


@given(SEGMENTS, st.sets(st.integers(0, 30), max_size=12), st.integers(0, 60), st.data())
def test_decide(
    upcoming: list[Segment], present_numbers: set[int], limit: int, data: st.DataObject
) -> None:
    """Kept is the longest beginning that fits; nothing of it goes, and the rest only for room."""
    present = {Segment(n, 0, 1, n) for n in present_numbers}
    sizes = {s: data.draw(st.integers(1, 20)) for s in {*upcoming, *present}}
    fetch, drop = decide(upcoming, present, sizes, limit)
    fits = 0
    while fits < len(upcoming) and sum(sizes[s] for s in upcoming[: fits + 1]) <= limit:
        fits += 1
    keep = upcoming[:fits]
    assert fetch == [s for s in keep if s not in present]
    assert not set(drop) & set(keep)
    left = (present - set(drop)) | set(fetch)
    assert sum(sizes[s] for s in left) <= limit or not present - set(drop) - set(keep)
    if sum(sizes[s] for s in {*present, *fetch}) <= limit:
        assert drop == []


def make_cached(
    url: str,
    folder: Path,
    *,
    limit: int = 10**9,
    workers: int = 0,
    global_batch: int = GLOBAL_BATCH,
    rank: int = 0,
    world: int = 1,
) -> StreamingLoader:
    """A loader like make_loader's, with a cache."""
    return StreamingLoader(
        ShardReader(PackedSplit.open(url)),
        order=ORDER,
        augment=AugmentConfig(),
        topology=Topology(global_batch=global_batch, rank=rank, world=world),
        size=16,
        workers=workers,
        cache=CacheConfig(folder=folder, limit=limit),
    )


def make_worker(split: PackedSplit, folder: Path, limit: int) -> _Worker:
    """What a fetching process runs, in this one."""
    order = Order([shard.samples for shard in split.manifest.shards], ORDER)
    demand = TrainingDemand(order, batch=GLOBAL_BATCH, rank=0, world=1)
    return _Worker(SegmentCache(folder, split), demand, CacheConfig(folder=folder, limit=limit))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def cached_bytes(folder: Path) -> int:
    """Of all segments."""
    found = (path for path in folder.glob("*/*") if path.suffix != ".npy" and path.name[0] != ".")
    return sum(path.stat().st_size for path in found)


def fetcher_of(loader: StreamingLoader) -> Fetcher:
    """The loader's."""
    assert loader._fetcher is not None
    return loader._fetcher


def needed_in(
    folder: Path, rank: int, world: int, split: PackedSplit, batch: int = EVEN
) -> tuple[SegmentCache, set[str]]:
    """A rank's cache, and the names of all segments that the rank ever reads."""
    order = Order([shard.samples for shard in split.manifest.shards], ORDER)
    demand = TrainingDemand(order, batch=batch, rank=rank, world=world)
    cache = SegmentCache(folder, split)
    return cache, {cache.name(segment) for segment in demand.segments}


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The training split on S3."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    url = f"s3://{BUCKET}/{tmp_path.name}/train"
    store = open_store(url)
    for path in (data_set() / "shards/train").iterdir():
        with store.create(path.name) as stream:
            stream.write(path.read_bytes())
    return url


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_batches_are_the_same_with_any_cache(
    url: str, tmp_path: Path, workers: int, limit: int
) -> None:
    """Bitwise, over epochs, while the cache fills, and with one that is far too small."""
    expected, loader = make_loader(), make_cached(url, tmp_path / "c", limit=limit, workers=workers)
    for epoch in range(3):
        expected.set_epoch(epoch)
        loader.set_epoch(epoch)
        assert_equal(list(loader), list(expected))
    assert cached_bytes(tmp_path / "c") <= limit


@pytest.mark.parametrize("world", [1, 4])
def test_the_second_epoch_reads_nothing_from_the_store(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Each of the nodes has a cache of its own, which holds its share and is all that it reads."""
    everything = sum(path.stat().st_size for path in (data_set() / "shards/train").glob("*.tar"))
    shares = 0.0
    split = PackedSplit.open(url)
    with FaultProxy(s3_endpoint()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for rank in range(world):
            folder = tmp_path / f"node{rank}"
            loader = make_cached(url, folder, global_batch=EVEN, rank=rank, world=world)
            list(loader)
            cache, needed = needed_in(folder, rank, world, split)
            until(lambda cache=cache, needed=needed: set(cache.sizes()) == needed)  # type: ignore[misc]
            before = len(proxy.seen)
            loader.set_epoch(1)
            list(loader)
            assert len(proxy.seen) == before
            shares += cached_bytes(folder)
    assert shares <= 1.05 * everything


def test_ranks_of_a_node_share_the_cache(url: str, tmp_path: Path) -> None:
    """Two ranks train while they fill one folder, lanes that both read included."""
    loaders = [make_cached(url, tmp_path / "c", rank=rank, world=2, workers=1) for rank in (0, 1)]
    expected = [make_loader(rank=rank, world=2) for rank in (0, 1)]
    for epoch in range(2):
        for loader in (*loaders, *expected):
            loader.set_epoch(epoch)
        for found, plain in zip(
            zip(*loaders, strict=True), zip(*expected, strict=True), strict=True
        ):
            assert_equal(list(found), list(plain))
    until_shared(url, tmp_path / "c")


def test_ranks_of_a_node_fetch_no_segment_twice(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow wire, so that they meet. No rank trains: its reader may bring bytes itself."""
    with FaultProxy(s3_endpoint(), bytes_per_s=100_000) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        loaders = [make_cached(url, tmp_path / "c", rank=rank, world=2) for rank in (0, 1)]
        for loader in loaders:
            fetcher_of(loader).at(0)
        until_shared(url, tmp_path / "c")
        # The counters follow the files by a moment.
        until(
            lambda: (
                sum(loader.counters().fetched_bytes for loader in loaders)
                == cached_bytes(tmp_path / "c")
            )
        )
        reads = [(seen.path, seen.range) for seen in proxy.seen if ".tar" in seen.path]
    assert len(reads) == len(set(reads)) > 0


def until_shared(url: str, folder: Path) -> None:
    """Wait for all that two ranks need, of which they share some."""
    split = PackedSplit.open(url)
    needed = [needed_in(folder, rank, 2, split, batch=GLOBAL_BATCH)[1] for rank in (0, 1)]
    assert needed[0] & needed[1]
    cache = SegmentCache(folder, split)
    until(lambda: set(cache.sizes()) == needed[0] | needed[1])


def test_a_damaged_store_costs_speed_alone(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A segment that cannot be cached is said once; the sample's own error is the reader's."""
    store = open_store(url)
    tar = bytearray(store.read("train-000002.tar"))
    index = PackedSplit.open(url).read_index(2)
    at = int(index.table["offset"][3])
    tar[at + 20 : at + 24] = b"\0\0\0\0"
    with store.create("train-000002.tar") as stream:
        stream.write(tar)
    worker = make_worker(PackedSplit.open(url), tmp_path / "c", 10**9)
    everything = sum(shard.bytes for shard in PackedSplit.open(url).manifest.shards)
    while cached_bytes(tmp_path / "c") < everything * 0.7:
        worker.step(0)
    for _ in range(20):
        worker.step(0)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"prefetch: not cached: .*train-000002.tar, offset {at}, sample", line)


def test_training_goes_on_without_its_fetcher(url: str, tmp_path: Path) -> None:
    """SIGKILL of the fetching process: the batches come, and a new loader fills the rest."""
    loader = make_cached(url, tmp_path / "c")
    iterator = iter(loader)
    found = [next(iterator)]
    process = fetcher_of(loader).process
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert_equal([*found, *iterator], list(make_loader()))
    again = make_cached(url, tmp_path / "c")
    assert_equal(list(again), list(make_loader()))


def test_the_fetcher_ends_with_its_loader(url: str, tmp_path: Path) -> None:
    """Deleting the loader ends the process."""
    loader = make_cached(url, tmp_path / "c")
    next(iter(loader))
    process = fetcher_of(loader).process
    assert process.is_alive()
    del loader
    assert not process.is_alive()


def test_too_little_room_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message says how much what is in use at a time would need."""
    worker = make_worker(open_shards().split, tmp_path / "c", 10)
    for tag in range(20):
        worker.step(tag)
    (line,) = capsys.readouterr().err.splitlines()
    assert "room for 0.00 GB of this process, but 0.00 GB are in use at a time" in line
    assert cached_bytes(tmp_path / "c") == 0


def test_a_full_disk_is_said_and_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and a pause before the next try; then it goes on."""
    worker = make_worker(open_shards().split, tmp_path / "c", 10**9)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda descriptor, data, at: full())
        for _ in range(6):
            worker.step(0)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= THREADS
    assert all("will try again in 30 s: [Errno 28]" in line for line in lines)
    worker._pause_until = 0
    until(lambda: worker.step(0) > 0)


def full() -> int:
    """What a write to a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_validation_has_a_cache_too(url: str, tmp_path: Path) -> None:
    """Every image once, in order, with the pixels that a loader without a cache gives."""
    make = partial(ValidationLoader, batch=5, resize=16, size=16)
    expected = list(make(open_shards(), workers=0))
    cache = CacheConfig(folder=tmp_path / "c", limit=10**9)
    loader = make(ShardReader(PackedSplit.open(url)), workers=2, cache=cache)
    for _ in range(2):
        assert_equal(list(loader), expected)
    until(lambda: cached_bytes(tmp_path / "c") > 0)


def test_a_cache_that_cannot_be_used_costs_speed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line, a pause, another try: here a file stands in the folder's place for a while."""
    split = open_shards().split
    worker = make_worker(split, tmp_path / "c", 10**9)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / split.manifest.digest).touch()
    for _ in range(3):
        assert worker.step(0) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot fill the cache, will try again in 30 s: [Errno 17] File exists" in line
    (tmp_path / "c" / split.manifest.digest).unlink()
    worker._pause_until = 0
    until(lambda: worker.step(0) > 0)


def test_a_service_that_refuses_is_asked_again_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that have run out, for one: the fetcher outlives what training may outlive."""
    worker = make_worker(open_shards().split, tmp_path / "c", 10**9)

    def refuse(segment: Segment) -> int:
        raise UsageError("cannot read it: the keys have expired")

    with monkeypatch.context() as patch:
        patch.setattr(worker._cache, "fill", refuse)
        for _ in range(6):
            worker.step(0)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= THREADS
    assert all("try again in 30 s: cannot read it: the keys have expired" in x for x in lines)
    worker._pause_until = 0
    until(lambda: worker.step(0) > 0)
