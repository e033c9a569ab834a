"""Trying again: within the limits, whatever the other side does."""

import logging
import pickle
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.retry import Clock, Counts, GaveUpError, PassingError, RetryPolicy, persist, uniform

POLICY = RetryPolicy()


@dataclass
class World:
    """A clock that only sleep moves, and requests of `request_s`, the first of which fail."""

    failures: int
    request_s: float = 1.0
    draw: float = 0.5
    now: float = 100.0
    requests: int = 0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def attempt(self, number: int) -> str:
        self.requests += 1
        assert number == self.requests
        self.sleep(self.request_s)
        if number <= self.failures:
            raise PassingError(f"reason {number}")
        return "done"

    def run(self, policy: RetryPolicy = POLICY, size: int = 0, counts: Counts | None = None) -> str:
        clock = Clock(now=lambda: self.now, sleep=self.sleep, uniform=lambda: self.draw)
        return persist(
            self.attempt,
            what="cannot x",
            size=size,
            policy=policy,
            clock=clock,
            counts=counts or Counts(),
        )


def test_twenty_failures_are_outlived() -> None:
    """With the defaults a service that answers 20 times with 503 SlowDown is outlived."""
    world, counts = World(failures=20, request_s=0.1), Counts()
    assert world.run(counts=counts) == "done"
    assert (counts.requests, counts.retries) == (21, 20)
    assert 60 < world.now - 100 < 200


@given(
    st.integers(0, 100),
    st.floats(0, 400),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 50),
    st.integers(0, 10**9),
)
def test_limits(failures: int, request_s: float, draw: float, requests: int, size: int) -> None:
    """Success, or GaveUpError: never more requests than allowed, nor time beyond one request."""
    world = World(failures, request_s, draw)
    policy = replace(POLICY, requests=requests)
    try:
        assert world.run(policy, size) == "done"
    except GaveUpError:
        assert world.requests <= failures
    assert world.requests <= min(requests, failures + 1)
    assert world.now - 100 <= policy.budget_s + size / policy.min_bytes_per_s + request_s + 1e-6


def test_the_error_says_what_how_often_how_long_and_why() -> None:
    """GaveUpError is one line of all that one needs; it travels between processes."""
    with pytest.raises(GaveUpError) as caught:
        World(failures=9).run(replace(POLICY, requests=3))
    text = "cannot x: no success in 3 requests over 3 s, at last reason 3; see whether"
    assert str(caught.value).startswith(text)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_other_errors_pass_at_once() -> None:
    """What will not pass is not tried again."""

    def attempt(number: int) -> None:
        assert number == 1
        raise KeyError

    with pytest.raises(KeyError):
        persist(attempt, what="", policy=POLICY, clock=Clock(), counts=Counts())


def test_waits() -> None:
    """Waits double up to the longest; many failures do not overflow."""
    waits = [POLICY.longest_wait(failures) for failures in (1, 2, 3, 8, 9, 10**6)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 12.8, 20, 20])
    draws = [uniform() for _ in range(1000)]
    assert 0 <= min(draws) < 0.05
    assert 0.95 < max(draws) < 1


def test_long_waits_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """A wait of seconds is a line in the log, a short one is not."""
    World(failures=7, draw=0.99).run()
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "cannot x: reason 6; request 7 in 3 s"),
        (logging.WARNING, "cannot x: reason 7; request 8 in 6 s"),
    ]


@pytest.mark.parametrize("name", ["budget_s", "requests", "stall_s", "min_bytes_per_s"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_limits_must_be_limits(name: str, value: float) -> None:
    """A limit of nothing or of everything is refused."""
    with pytest.raises(ValueError, match=f"{name} must be above 0 and below 1e12"):
        replace(POLICY, **{name: value})  # type: ignore[arg-type]


def test_seconds_for_a_request() -> None:
    """5 s to connect, 1 MB/s, 10 s of silence."""
    assert POLICY.seconds_for(8_000_000) == 23
