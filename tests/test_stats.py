"""Counters: what workers did arrives in the training process, whoever did it."""

import pytest

from loaders.stats import Counters, Stats
from tests.make_shards import STEPS, make_loader, open_shards


def test_rows_are_added() -> None:
    """Each row by itself; the total is of all."""
    stats = Stats(3)
    stats.add(0, Counters(samples=2, read_s=0.5))
    stats.add(2, Counters(samples=3, cached=1))
    stats.add(2, Counters(samples=4))
    before = stats.total()
    assert before == Counters(samples=9, read_s=0.5, cached=1)
    stats.add(1, Counters(samples=1))
    assert stats.total().minus(before) == Counters(samples=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_counts_what_it_did(workers: int) -> None:
    """Samples and bytes are those that were read; time was spent."""
    loader = make_loader(workers=workers)
    numbers = [int(number) for batch in loader for number in batch.numbers]
    counters, waited = loader.counters()
    reader = open_shards()
    assert counters.samples >= len(numbers)  # workers are ahead
    if not workers:
        assert counters.samples == STEPS * 12
        assert counters.read_bytes == sum(len(reader.read(number)) for number in numbers)
    assert counters.decode_s > 0
    assert counters.read_s > 0
    assert waited > 0
    assert (counters.cached, counters.requests, counters.retries) == (0, 0, 0)
