"""Shuffling: classes that stand in runs are noticed, by the rules of the loader's own order."""

import re

import numpy as np
import pytest

from loaders.order import Order, OrderConfig
from sharding.shuffling import Labels, shuffle_quality, sorted_warning


def shards(labels: Labels, samples: int) -> list[Labels]:
    """Cut labels into shards."""
    return np.split(labels, range(samples, len(labels), samples))


def classes(count: int, samples: int) -> tuple[Labels, Labels]:
    """Labels of so many samples a class, sorted and mixed."""
    labels = np.repeat(np.arange(count, dtype=np.uint32), samples)
    return labels, np.random.default_rng(0).permutation(labels)


def test_sorted_classes() -> None:
    """Sorted classes, and a class a shard, are warned of with numbers; mixed ones are not."""
    labels, mixed = classes(200, 50)
    for samples in (50, 100, 130):
        text = sorted_warning(shards(labels, samples), lanes=4, window=100)
        assert text is not None
        found = re.search(r"the (\d+) samples .* of (\d+) classes, .* has (\d+)", text)
        assert found
        mixed_at_once, seen, full = map(int, found.groups())
        assert (mixed_at_once, full) == (400, 174)  # 200 (1 - 0.96^50)
        assert 12 <= seen <= 40  # 3 to 10 classes in each of 4 windows
        assert "unpack" in text
        assert sorted_warning(shards(mixed, samples), lanes=4, window=100) is None
    assert sorted_warning(shards(labels, 50), lanes=4, window=5000) is None  # all is mixed
    assert sorted_warning(shards(labels, 10_000), lanes=4, window=100) is None  # in one shard
    assert sorted_warning(shards(labels[:1], 1), lanes=4, window=100) is None


def test_quality_of_imagenet() -> None:
    """ImageNet sorted by class: 32 lanes see some of the 1,000 classes at a time."""
    labels, mixed = classes(1000, 1281)
    found = shuffle_quality(shards(labels, 1200), lanes=32, window=1024)
    assert found.samples == 32 * 1024
    assert 130 <= found.seen <= 170
    assert found.full == pytest.approx(1000)
    found = shuffle_quality(shards(mixed, 1200), lanes=32, window=1024)
    assert found.seen == pytest.approx(found.full, rel=1e-3)


def test_quality_is_that_of_the_loader() -> None:
    """The loader's own order brings about as many classes in a step as is computed."""
    labels, _ = classes(200, 50)
    found = shuffle_quality(shards(labels, 50), lanes=4, window=100)
    order = Order([50] * 200, OrderConfig(lanes=4, window=100))
    seen = []
    for step in range(0, order.steps(400), 5):
        numbers = order.part(epoch=0, step=step, batch=400, rank=0, world=1)
        seen.append(len(np.unique(labels[numbers])))
    assert found.seen == pytest.approx(np.mean(seen), rel=0.1)
