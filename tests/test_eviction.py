"""What earlier runs left in a node's cache goes when room is needed, and nothing else does."""

import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.cache import SegmentCache
from loaders.demand import TrainingDemand
from loaders.eviction import ABANDONED_S, Cached, abandoned, delete, make_room, scan
from loaders.order import Order, OrderConfig
from loaders.prefetch import CacheConfig, _Worker
from tests.make_shards import GLOBAL_BATCH, ORDER, open_shards

NOW = 1e6
HEX = "0123456789abcdef" * 2


@given(
    st.lists(st.tuples(st.floats(0, 3 * ABANDONED_S), st.integers(1, 9)), max_size=12),
    st.integers(-5, 60),
)
def test_abandoned(ages: list[tuple[float, int]], excess: int) -> None:
    """Oldest first, no more than needed, and nothing that somebody claims."""
    found = [Cached(NOW - age, size, Path(str(i))) for i, (age, size) in enumerate(ages)]
    gone = abandoned(found, excess=excess, now=NOW)
    others = [cached for cached in found if cached not in gone]
    nobodys = [cached for cached in found if cached.claimed <= NOW - ABANDONED_S]
    assert set(gone) <= set(nobodys)
    assert all(cached <= other for cached in gone for other in others if other in nobodys)
    size = sum(cached.size for cached in gone)
    assert size >= excess or len(gone) == len(nobodys)
    assert not gone or size - gone[-1].size < excess


def make(path: Path, *, age: float, size: int = 100) -> Path:
    """A file that was claimed so many seconds ago."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(bytes(size))
    os.utime(path, (0, time.time() - age))
    return path


def test_only_a_caches_own_files_are_deleted(tmp_path: Path) -> None:
    """Of any data set, what is half-fetched included; nothing that somebody put beside it."""
    old = 2 * ABANDONED_S
    names = (
        f"{HEX}-0-7",
        f"{HEX}.npy",
        f".part-{HEX}-7-9",
        f".part-{HEX}-7-9.rows",
        f".tmp-{HEX}.npy-a_b1",
    )
    ours = [make(tmp_path / data_set / n, age=old) for data_set in (HEX, HEX[::-1]) for n in names]
    theirs = [
        make(tmp_path / place, age=old)
        for place in ("photo.jpg", f"{HEX}-0-7", "other/thing", f"{HEX}/notes.txt", f"{HEX}/{HEX}")
    ]
    assert {cached.path for cached in scan(tmp_path)} == set(ours)
    assert make_room(tmp_path, coming=0, limit=1000) == 0
    assert make_room(tmp_path, coming=150, limit=1000) == 200
    assert make_room(tmp_path, coming=0, limit=0) == 800
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert make_room(tmp_path / "none", coming=9, limit=0) == 0


def test_what_is_claimed_or_read_stays(tmp_path: Path) -> None:
    """However far the limit is exceeded."""
    claimed = make(tmp_path / HEX / f"{HEX}-0-1", age=ABANDONED_S - 60)
    read = make(tmp_path / HEX / f"{HEX}-1-2", age=2 * ABANDONED_S)
    with read.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        assert make_room(tmp_path, coming=1000, limit=0) == 0
        assert not delete(read)
    assert make_room(tmp_path, coming=1000, limit=0) == 100
    assert claimed.exists()
    assert delete(read)


def fill(folder: Path, order: OrderConfig, node_limit: int) -> set[Path]:
    """Fetch all that training with this order needs; the paths of its segments."""
    split = open_shards().split
    demand = TrainingDemand(Order(open_shards().counts, order), batch=GLOBAL_BATCH, rank=0, world=1)
    cache = SegmentCache(folder, split)
    config = CacheConfig(folder=folder, limit=10**9, node_limit=node_limit)
    worker = _Worker(cache, demand, config)
    wanted = {cache.name(segment) for segment in demand.segments}
    deadline = time.monotonic() + 60
    while not wanted <= set(cache.sizes()):
        assert time.monotonic() < deadline
        worker.step(0)
    return {cache.folder / name for name in wanted}


@pytest.mark.parametrize("seconds", [0, 2 * ABANDONED_S])
def test_a_run_with_another_seed_takes_the_place_of_the_one_before(
    tmp_path: Path, seconds: float
) -> None:
    """Its segments end elsewhere; the limit has room for one run. A run that goes on keeps its."""
    first = fill(tmp_path, ORDER, 10**9)
    whole = sum(cached.size for cached in scan(tmp_path))
    for path in first:
        os.utime(path, (0, time.time() - seconds))
    second = fill(tmp_path, replace(ORDER, seed=ORDER.seed + 1), int(1.1 * whole))
    assert len(first - second) > 3
    if seconds:
        assert sum(cached.size for cached in scan(tmp_path)) <= 1.1 * whole
    else:
        assert all(path.exists() for path in first)
    assert all(path.exists() for path in second)
