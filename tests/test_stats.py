"""Counters: what workers did arrives in the training process, whoever did it."""

import pytest

from loaders.stats import Clock, Counters, Stats, rates
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
    counters, metrics = loader.counters(), loader.metrics()
    reader = open_shards()
    assert counters.samples >= len(numbers)  # workers are ahead
    if not workers:
        assert counters.samples == STEPS * 12
        assert counters.read_bytes == sum(len(reader.read(number)) for number in numbers)
    assert counters.decode_s > 0
    assert counters.read_s > 0
    assert metrics["data/images_per_s"] > 0
    assert 0 < metrics["data/wait_fraction"] <= 1
    assert loader.metrics()["data/images_per_s"] == 0  # nothing since
    assert (counters.cached, counters.requests, counters.retries) == (0, 0, 0)


def test_rates() -> None:
    """Over two seconds: 10 images, half of the time waited, half of them from the cache."""
    did = Counters(samples=20, read_bytes=4e6, read_s=0.2, decode_s=0.1, cached=10, retries=3)
    found = rates(Clock(10, 1, 5, Counters()), Clock(12, 2, 15, did))
    assert found["data/images_per_s"] == 5
    assert found["data/wait_fraction"] == 0.5
    assert found["data/read_ms"] == pytest.approx(10)
    assert found["data/decode_ms"] == pytest.approx(5)
    assert found["data/read_mb_per_s"] == 2
    assert found["data/cache_hits"] == 0.5
    assert found["data/retries"] == 3
