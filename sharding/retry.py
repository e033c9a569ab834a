"""Trying again: how often, how far apart, until when. Nothing here knows what is tried."""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_LONG_WAIT_S = 2.0  # waits from here on are told, so that nobody takes them for a hang


class PassingError(Exception):
    """Raised by one try that failed for a reason that may pass; its text is the reason."""


class OverloadedError(PassingError):
    """Raised by one try that the service refused because it has too much to do."""


class UnreachableError(PassingError):
    """Raised by one try to which nobody answered."""


class GaveUpError(OSError):
    """Raised when a remote store did not do within the limits what it was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """The limits of one operation on a remote store: a read, a part of an upload, a listed page.

    A request to which no byte comes for `stall_s` is broken off, and so is one that has not moved
    its n bytes of data after `connect_s + n / min_bytes_per_s + stall_s`; the next one goes over a
    fresh connection. (Headers and listings that trickle are bounded by `stall_s` alone.) Whatever
    the service does, an operation ends before `budget_s + n / min_bytes_per_s` and one request.
    """

    budget_s: float = 300.0
    """Time for an operation with all its tries, beyond that of its bytes at the least rate."""
    requests: int = 40
    """Most requests of one operation; with the waits below the budget ends at about as many."""
    first_wait_s: float = 0.1
    """Longest wait after the first failure. It doubles with each; waits are uniform from 0 on."""
    longest_wait_s: float = 20.0
    reach_s: float = 30.0
    """Time for a service that has not answered this process yet: its address may be wrong."""
    connect_s: float = 5.0
    stall_s: float = 10.0
    min_bytes_per_s: float = 1e6

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < 1e12:
                raise ValueError(f"{name} must be above 0 and below 1e12, got {value}")

    def seconds_for(self, size: int) -> float:
        """How long one request may take that moves this many bytes."""
        return self.connect_s + size / self.min_bytes_per_s + self.stall_s

    def longest_wait(self, failures: int) -> float:
        """The upper end of the wait after so many failures."""
        return float(min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(failures - 1, 60)))


def uniform() -> float:
    """A number in [0, 1) that forked processes do not share, and that touches no generator."""
    return int.from_bytes(os.urandom(6), "little") / (1 << 48)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """What trying again takes of the world, to be replaced in tests."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[], float] = uniform


@dataclass(kw_only=True)
class Counts:
    """What a process has asked of a remote store. Read it at any time, from any thread."""

    requests: int = 0
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(
        self, *, requests: int = 0, retries: int = 0, bytes_read: int = 0, bytes_written: int = 0
    ) -> None:
        """Add to the counts."""
        with self._lock:
            self.requests += requests
            self.retries += retries
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written


def persist(
    attempt: Callable[[int], T],
    *,
    what: str,
    size: int = 0,
    policy: RetryPolicy,
    clock: Clock,
    counts: Counts,
) -> T:
    """Call `attempt` with 1, 2, ... until it returns, and return that.

    what: begins the messages ("cannot read s3://..."); size: the bytes that the operation moves.
    Raises GaveUpError at the policy's limits; errors other than PassingError pass at once.
    """
    began = clock.now()
    end = began + policy.budget_s + size / policy.min_bytes_per_s
    for number in itertools.count(1):
        counts.add(requests=1, retries=int(number > 1))
        try:
            return attempt(number)
        except PassingError as error:
            wait = policy.longest_wait(number) * clock.uniform()
            now = clock.now()
            if number >= policy.requests or now + wait > end:
                raise GaveUpError(
                    f"{what}: no success in {number} requests over {now - began:.0f} s, at last "
                    f"{error}; see whether the service and the network are well, and start the "
                    "same command again"
                ) from error
            if wait >= _LONG_WAIT_S:
                _LOG.warning("%s: %s; request %d in %.0f s", what, error, number + 1, wait)
        clock.sleep(wait)
    raise AssertionError("unreachable")
