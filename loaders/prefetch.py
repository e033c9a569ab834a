"""Brings what a rank will read into the node's cache, ahead of training and across epochs.

One process a rank. It knows the plan, so it fetches what is needed soonest, keeps as much of what
comes next as the limit lets it, and deletes only what is needed later than that, and what earlier
runs left if it stands in the way. Whatever it cannot do (the store is down, the disk is full) costs
speed alone: readers read by range what is not there.
"""

import itertools
import sys
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from ctypes import c_int64
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from loaders.cache import CachedReader, SegmentCache
from loaders.demand import Demand
from loaders.eviction import CLAIM_S
from loaders.order import Segment
from loaders.reader import ShardReader
from loaders.stats import Counters, Stats
from sharding.errors import DataError, UsageError, with_remedy
from sharding.process import FROM_SERVER, start_served_worker, start_server

THREADS = 8
_POLL_S = 0.1
_PAUSE_S = 30.0  # after an error of the store or the disk
_RESCAN_S = 5.0  # other ranks of the node fill the same folder


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """A folder of the node, and how much of it one rank may fill."""

    folder: Path
    limit: int
    """In bytes, of this rank."""
    node_limit: int = sys.maxsize
    """In bytes, of all that is in the folder, whoever has fetched it."""


class Decision(NamedTuple):
    """What is to be fetched next, in this order, and what may go for it."""

    fetch: list[Segment]
    drop: list[Segment]


def decide(
    upcoming: Iterable[Segment], present: set[Segment], bytes_of: dict[Segment, int], limit: int
) -> Decision:
    """PURE: keep what is needed soonest, as much as fits in the limit.

    `drop` is empty while everything present fits.
    """
    keep: dict[Segment, None] = {}
    total = 0
    for segment in upcoming:
        total += bytes_of[segment]
        if total > limit:
            break
        keep[segment] = None
    fetch = [segment for segment in keep if segment not in present]
    others = [segment for segment in present if segment not in keep]
    whole = sum(bytes_of[s] for s in itertools.chain(present, fetch))
    return Decision(fetch, others if whole > limit else [])


class Fetcher:
    """The process that fills the cache for one rank."""

    def __init__(
        self, cache: SegmentCache, demand: Demand, config: CacheConfig, *, stats: Stats, row: int
    ) -> None:
        """row: of the counters, where this process counts."""
        start_server("loaders.preload")
        self._position = FROM_SERVER.RawValue(c_int64)
        self.process = FROM_SERVER.Process(
            target=_run, args=(cache, demand, config, stats, row, self._position), daemon=True
        )
        self._started = False

    def at(self, tag: int) -> None:
        """Tell where training is; starts the process at the first call."""
        self._position.value = tag
        if not self._started:
            self._started = True
            self.process.start()

    def close_with(self, owner: object) -> None:
        """End the process when `owner` is collected, or at the interpreter's exit."""
        weakref.finalize(owner, self._close)

    def _close(self) -> None:
        if self._started:
            self.process.terminate()  # kills: see sharding/process.py
            self.process.join()


def with_cache(
    reader: ShardReader, demand: Demand, config: CacheConfig, *, stats: Stats, row: int
) -> tuple[CachedReader, Fetcher]:
    """A reader of the same split through the cache, and what fills that."""
    cache = SegmentCache(config.folder, reader.split)
    fetcher = Fetcher(cache, demand, config, stats=stats, row=row)
    return CachedReader(cache, demand.segments), fetcher


def _run(  # noqa: PLR0917 (a process's arguments)
    cache: SegmentCache,
    demand: Demand,
    config: CacheConfig,
    stats: Stats,
    row: int,
    position: c_int64,
) -> None:
    start_served_worker()
    worker = _Worker(cache, demand, config)
    while True:
        fetched = worker.step(position.value)
        if fetched:
            stats.add(row, Counters(fetched_bytes=fetched))


class _Worker:
    """The state of the fetching process: what is there, what is on its way."""

    def __init__(self, cache: SegmentCache, demand: Demand, config: CacheConfig) -> None:
        self._cache, self._demand, self._config = cache, demand, config
        self._bytes_of = {segment: _estimate(cache, segment) for segment in demand.segments}
        self._pool = ThreadPoolExecutor(THREADS)
        self._on_the_way: dict[Future[int], Segment] = {}
        self._failed: set[Segment] = set()
        self._present: set[Segment] = set()
        self._swept = False
        self._scanned = self._claimed = self._pause_until = -1e9
        if (most := demand.most_open(self._bytes_of)) > config.limit:
            _say(
                f"the cache in {cache.folder} has room for {config.limit / 1e9:.2f} GB of this "
                f"process, but {most / 1e9:.2f} GB are in use at a time; the rest is read by "
                "range, which is slower (data.cache_gb is for all processes of the node)"
            )

    def step(self, tag: int) -> int:
        """Start what can be started, wait a moment, and see what came; bytes fetched."""
        if time.monotonic() >= self._pause_until:
            try:
                self._look_around(tag)
                if len(self._on_the_way) < THREADS:
                    self._start(tag)
            except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
                self._pause(error)
        if not self._on_the_way:
            time.sleep(_POLL_S)
            return 0
        done, _ = wait(self._on_the_way, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        return sum(self._finish(future) for future in done)

    def _look_around(self, tag: int) -> None:
        """See, now and then, what is there."""
        now = time.monotonic()
        if not self._swept:
            self._cache.folder.mkdir(parents=True, exist_ok=True)
            self._cache.sweep()
            self._swept = True
        if now - self._scanned > _RESCAN_S:
            self._scanned = now
            names = self._cache.sizes()
            self._present = {s for s in self._demand.segments if self._cache.name(s) in names}
        if now - self._claimed > CLAIM_S:
            self._claimed = now
            self._claim(tag)

    def _claim(self, tag: int) -> None:
        """Keep what is there from being taken for abandoned, and make room for what is to come."""
        self._cache.claim(self._present)
        fetch, _ = decide(
            self._demand.upcoming(tag), self._present, self._bytes_of, self._config.limit
        )
        coming = sum(self._bytes_of[segment] for segment in fetch)
        self._cache.make_room(coming=coming, limit=self._config.node_limit)

    def _start(self, tag: int) -> None:
        coming = set(self._on_the_way.values())
        fetch, drop = decide(
            self._demand.upcoming(tag), self._present | coming, self._bytes_of, self._config.limit
        )
        for segment in drop:
            if segment not in coming and self._cache.drop(segment):
                self._present.discard(segment)
        used = sum(self._bytes_of[segment] for segment in self._present | coming)
        for segment in fetch:
            if segment in self._failed:
                continue
            used += self._bytes_of[segment]
            if len(self._on_the_way) == THREADS or used > self._config.limit:
                return
            self._on_the_way[self._pool.submit(self._cache.fill, segment)] = segment

    def _finish(self, future: "Future[int]") -> int:
        segment = self._on_the_way.pop(future)
        try:
            fetched = future.result()
        except DataError as error:  # whoever trains on it will say so
            self._failed.add(segment)
            _say(f"not cached: {error}")
            return 0
        except (OSError, UsageError) as error:  # UsageError: a service that refuses, for now
            self._pause(error)
            return 0
        if fetched:
            self._present.add(segment)
        else:  # another process has it, or had it
            self._scanned = -1e9
            time.sleep(_POLL_S)
        return fetched

    def _pause(self, error: Exception) -> None:
        self._pause_until = time.monotonic() + _PAUSE_S
        what = with_remedy(error) if isinstance(error, OSError) else str(error)
        _say(f"cannot fill the cache, will try again in {_PAUSE_S:.0f} s: {what}")


def _estimate(cache: SegmentCache, segment: Segment) -> int:
    """A segment's bytes, as its share of the shard's, without reading the index."""
    shard = cache.split.manifest.shards[segment.shard]
    return shard.bytes * (segment.last - segment.first) // shard.samples


def _say(text: str) -> None:
    print(f"prefetch: {text}", file=sys.stderr, flush=True)
