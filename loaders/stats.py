"""What a loader's processes did: counters in memory that they share with training."""

from ctypes import c_double
from typing import NamedTuple

from sharding.process import FROM_SERVER


class Counters(NamedTuple):
    """Sums since the loader was made."""

    samples: float = 0
    read_bytes: float = 0
    """Of samples, from wherever they came."""
    read_s: float = 0
    """Time in which a worker waited for bytes."""
    decode_s: float = 0
    cached: float = 0
    """Samples that came from the node's cache."""
    requests: float = 0
    """To an object store."""
    retries: float = 0
    substituted: float = 0
    """Bad samples in batches, whose places others took."""
    fetched_bytes: float = 0
    """That were brought from the store into the cache."""

    def minus(self, before: "Counters") -> "Counters":
        """What was added since."""
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


class Stats:
    """A row of counters for each process that counts; each row is written by its process alone."""

    def __init__(self, rows: int) -> None:
        self._values = FROM_SERVER.RawArray(c_double, rows * len(Counters._fields))
        self._rows = rows

    def add(self, row: int, counters: Counters) -> None:
        """Add to a row."""
        first = row * len(counters)
        for at, value in enumerate(counters, first):
            self._values[at] += value

    def total(self) -> Counters:
        """The sum of all rows."""
        width = len(Counters._fields)
        values = self._values[:]
        return Counters(*(sum(values[at::width]) for at in range(width)))


class Clock(NamedTuple):
    """A moment of a loader's life."""

    seconds: float
    waited: float
    """Seconds that training waited for batches until then."""
    samples: int
    """Delivered until then."""
    counters: Counters


def rates(then: Clock, now: Clock) -> dict[str, float]:
    """PURE: what happened between two moments, under the names that logs use."""
    seconds = max(now.seconds - then.seconds, 1e-9)
    did = now.counters.minus(then.counters)
    images = max(did.samples, 1)
    return {
        "data/images_per_s": (now.samples - then.samples) / seconds,
        "data/wait_fraction": (now.waited - then.waited) / seconds,
        "data/read_ms": 1e3 * did.read_s / images,
        "data/decode_ms": 1e3 * did.decode_s / images,
        "data/read_mb_per_s": did.read_bytes / 1e6 / seconds,
        "data/fetched_mb_per_s": did.fetched_bytes / 1e6 / seconds,
        "data/cache_hits": did.cached / images,
        "data/requests": did.requests,
        "data/retries": did.retries,
        "data/substituted": did.substituted,
    }
