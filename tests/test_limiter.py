"""The limiter before a service: how many are inside at a time."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.limiter import ConcurrencyLimiter


@given(st.integers(1, 100), st.lists(st.booleans()))
def test_the_number_stays_in_its_limits(most: int, answers: list[bool]) -> None:
    """Never none, never more than at first; a halving at each refusal."""
    limiter = ConcurrencyLimiter(most)
    for good in answers:
        before = limiter.allowed
        with limiter.enter() as turn:
            limiter.faster() if good else limiter.slower(turn)
        assert 1 <= limiter.allowed <= most
        assert good or limiter.allowed <= max(1, (before + 1) / 2)
        assert not good or before <= limiter.allowed <= before + 1


def test_one_burst_of_refusals_counts_once() -> None:
    """What was asked before the number was halved says nothing about the new number."""
    limiter = ConcurrencyLimiter(8)
    with limiter.enter() as first, limiter.enter() as second, limiter.enter() as third:
        for turn in (first, second, third):
            limiter.slower(turn)
    assert limiter.allowed == 4
    with limiter.enter() as turn:
        limiter.slower(turn)
    assert limiter.allowed == 2


def test_it_opens_again() -> None:
    """From 1 to 8 in at most the sum of the numbers between, and no further."""
    limiter = ConcurrencyLimiter(8)
    for _ in range(3):
        with limiter.enter() as turn:
            limiter.slower(turn)
    assert limiter.allowed == 1
    for _ in range(sum(range(1, 10))):
        limiter.faster()
    assert limiter.allowed == 8


@pytest.mark.parametrize("halvings", [0, 1, 2, 5])
def test_no_more_than_allowed_are_inside(halvings: int) -> None:
    """12 threads at a limiter for 8 that was halved so often; all get through."""
    limiter = ConcurrencyLimiter(8)
    for _ in range(halvings):
        with limiter.enter() as turn:
            limiter.slower(turn)
    allowed = limiter.allowed
    inside: set[int] = set()
    most = 0
    lock, full = threading.Lock(), threading.Event()

    def work(number: int) -> None:
        nonlocal most
        with limiter.enter():
            with lock:
                inside.add(number)
                most = max(most, len(inside))
                if len(inside) == allowed:
                    full.set()
            assert full.wait(30)  # as many as may are inside at the same time
            with lock:
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == allowed
