"""ValidationLoader: every sample once, on any number of ranks."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.augment import centre_crops
from loaders.decode import get_decoder
from loaders.validation import ValidationLoader, validation_batches
from tests.make_shards import SAMPLES, assert_equal, open_shards


def make(*, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> ValidationLoader:
    """Loader of one rank, 16 x 16 pixels."""
    reader = open_shards(split="val")
    return ValidationLoader(
        reader, batch=batch, rank=rank, world=world, resize=20, size=16, workers=workers
    )


@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 40))
def test_batches_are_shared_out(samples: int, batch: int, world: int) -> None:
    """Ranks' batches one after the other are all batches, uneven by at most one."""
    parts = [
        validation_batches(samples, batch=batch, rank=rank, world=world) for rank in range(world)
    ]
    assert [number for part in parts for number in part] == list(range(-(-samples // batch)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("world", range(1, 8))
def test_every_sample_once(world: int, batch: int) -> None:
    """Ranks together deliver samples 0, 1, 2, ... each once, in the order of one rank alone."""
    loaders = [make(batch=batch, rank=rank, world=world) for rank in range(world)]
    found = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(part) for part in found]
    assert_equal([*chain.from_iterable(found)], list(make(batch=batch)))
    numbers = [n for part in found for piece in part for n in piece.numbers.tolist()]
    assert numbers == list(range(SAMPLES["val"]))


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_workers_change_nothing(workers: int) -> None:
    """Each validation, also one that follows an unfinished one, is that of no workers."""
    loader = make(batch=3, workers=workers)
    expected = list(make(batch=3))
    for _ in range(2):
        assert_equal(list(loader), expected)
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_batches(workers: int) -> None:
    """With more ranks than batches a rank may have none: its length is 0 and it yields nothing."""
    loaders = [make(batch=5, rank=rank, world=3, workers=workers) for rank in range(3)]
    assert [len(loader) for loader in loaders] == [0, 1, 1]
    assert [len(list(loader)) for loader in loaders] == [0, 1, 1]


def test_pixels_are_the_centre_crops() -> None:
    """Images are resized on the shorter side and cropped in their centre."""
    reader = open_shards(split="val")
    numbers = np.arange(SAMPLES["val"])
    labels, widths, heights = reader.facts(numbers)
    (batch,) = make(batch=64)
    assert batch.labels.tolist() == labels.tolist()
    boxes = centre_crops(widths, heights, resize=20, size=16).boxes
    for number, box, image in zip(numbers.tolist(), boxes, batch.images, strict=True):
        pixels = np.empty((16, 16, 3), np.uint8)
        get_decoder("auto")(pixels, reader.read(number), tuple(box), False, True)
        assert np.array_equal(image, pixels)


def test_a_temporary_loader_still_yields_everything() -> None:
    """Iterating keeps the loader: its workers end with it, and half an epoch would look whole."""
    assert len(list(make(batch=3))) == len(make(batch=3)) > 1
