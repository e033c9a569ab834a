"""Augment: torchvision's crops, drawn from each sample's own numbers."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms import functional as tv

from loaders.augment import AugmentConfig, Crops, Draw, centre_crops, erased_boxes, random_crops
from sharding.streams import Integers, Purpose

sides = st.integers(1, 5000)
some_cases = settings(deadline=None, max_examples=200)


def draw_of(numbers: Integers, *, seed: int = 0, epoch: int = 0, copy: int = 0) -> Draw:
    """These samples, all of one copy."""
    return Draw(seed, epoch, numbers, np.full(len(numbers), copy))


def crops(count: int, width: int, height: int, **options: Any) -> Crops:
    """Crops of samples 0 to count - 1, all of one size."""
    sizes = np.full(count, width), np.full(count, height)
    return random_crops(draw_of(np.arange(count), seed=1), *sizes, AugmentConfig(**options))


@some_cases
@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=20),
    st.builds(
        AugmentConfig,
        crop_scale=st.tuples(st.floats(0.001, 0.5), st.floats(0.5, 1)),
        crop_ratio=st.tuples(st.floats(0.6, 1), st.floats(1, 1.6)),
    ),
    st.integers(0, 1 << 40),
)
def test_boxes_are_inside(sizes: list[tuple[int, int]], config: AugmentConfig, first: int) -> None:
    """A random box has whole corners, at least one pixel, and lies inside its image."""
    widths, heights = np.array(sizes).T
    numbers = np.arange(first, first + len(sizes))
    boxes = random_crops(draw_of(numbers), widths, heights, config).boxes
    left, top, right, bottom = boxes.T
    assert np.array_equal(boxes, np.rint(boxes))
    assert np.all((left >= 0) & (top >= 0) & (right > left) & (bottom > top))
    assert np.all((right <= widths) & (bottom <= heights))


def distance(some: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> float:
    """Kolmogorov and Smirnov's: the largest gap between two samples' distributions."""
    at = np.concatenate([some, others])
    ranks = [np.searchsorted(np.sort(x), at, "right") / len(x) for x in (some, others)]
    return float(np.abs(ranks[0] - ranks[1]).max())


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (500, 375),  # most boxes fit at once
        (60, 300),  # most do not: the central box is common
        (320, 40),
    ],
)
def test_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    """Area, ratio and place of 4,000 boxes are spread as those of RandomResizedCrop."""
    image = torch.empty(0, height, width)
    config = AugmentConfig()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get = RandomResizedCrop.get_params
        drawn = [get(image, [*config.crop_scale], [*config.crop_ratio]) for _ in range(4000)]
    top, left, high, wide = np.array(drawn, np.float64).T
    boxes = crops(4000, width, height).boxes.T
    w, h = boxes[2] - boxes[0], boxes[3] - boxes[1]
    for ours, theirs in (
        (w * h, wide * high),
        (w / h, wide / high),
        (boxes[0], left),
        (boxes[1], top),
    ):
        assert distance(ours, theirs) < 0.04


@pytest.mark.parametrize("probability", [0, 0.5, 0.9, 1])
def test_flips_are_as_frequent_as_asked(probability: float) -> None:
    """The share of flips is the probability, exactly so for never and always."""
    flips = crops(10_000, 9, 9, flip_probability=probability).flips
    assert abs(flips.mean() - probability) <= 4 * math.sqrt(probability * (1 - probability) / 1e4)


@some_cases
@given(st.permutations(range(24)), st.integers(1, 24))
def test_a_sample_has_the_same_crop_in_any_batch(order: list[int], batch: int) -> None:
    """Order and size of the batch that a sample is in do not change its box or flip, to the bit."""
    widths, heights = np.array([(300 + 7 * i, 50 + 31 * i) for i in range(24)]).T
    whole = random_crops(draw_of(np.arange(24), seed=3, epoch=2), widths, heights, AugmentConfig())
    for first in range(0, 24, batch):
        some = np.array(order[first : first + batch])
        draw = draw_of(some, seed=3, epoch=2)
        part = random_crops(draw, widths[some], heights[some], AugmentConfig())
        assert np.array_equal(part.boxes, whole.boxes[some])
        assert np.array_equal(part.flips, whole.flips[some])


def test_every_sample_epoch_seed_and_copy_has_its_own_numbers() -> None:
    """No two of (sample, epoch, seed, copy) share a number, and all are in [0, 1)."""
    names = [(s, e, c) for s in (0, 1, 1 << 63) for e in (0, 1, 9) for c in (0, 1)]
    numbers = np.array([0, 1, 2, 1 << 20, 1 << 40])
    drawn = [
        draw_of(numbers, seed=s, epoch=e, copy=c).uniforms(purpose, 41)
        for s, e, c in names
        for purpose in (Purpose.AUGMENT, Purpose.POLICY, Purpose.ERASE)
    ]
    values = np.concatenate(drawn).ravel()
    assert len(np.unique(values)) == len(values)
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1


def test_crops_are_pinned() -> None:
    """Boxes and flips are the same in every release: a resumed run sees what it would have seen."""
    widths, heights = np.array([(500, 375), (375, 500), (33, 400), (1, 1), (5000, 7)]).T
    boxes, flips, exact = random_crops(
        draw_of(np.array([0, 2, 3, 4, 5]), seed=42, epoch=7), widths, heights, AugmentConfig()
    )
    assert boxes.tolist() == [
        [75, 40, 471, 347],
        [4, 100, 369, 487],
        [0, 178, 33, 222],
        [0, 0, 1, 1],
        [2495, 0, 2504, 7],
    ]
    assert flips.tolist() == [True, False, True, False, False]
    assert not exact


@some_cases
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 64), st.data())
def test_centre_crops_are_torchvisions(
    width: int, height: int, resize: int, data: st.DataObject
) -> None:
    """The box is what CenterCrop cuts out of the image that Resize makes, in source pixels."""
    size = data.draw(st.integers(1, resize))
    shape = tv.resize(torch.empty(1, height, width, device="meta"), [resize]).shape
    rows, columns = torch.arange(shape[1])[:, None], torch.arange(shape[2])
    top = tv.center_crop(rows.expand(shape), [size, size])[0, 0, 0]
    left = tv.center_crop(columns.expand(shape), [size, size])[0, 0, 0]
    expected = (
        np.array([left, top, left + size, top + size])
        * ([width, height] * 2)
        / ([shape[2], shape[1]] * 2)
    )
    found = centre_crops(np.array([width]), np.array([height]), resize=resize, size=size)
    np.testing.assert_allclose(found.boxes, [expected], rtol=1e-12)
    assert found.exact
    assert not found.flips.any()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"crop_scale": (0, 1)}, "crop_scale must be two numbers in 0..1"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale"),
        ({"crop_scale": (0.6, 0.5)}, "crop_scale"),
        ({"crop_scale": (0.5,)}, "crop_scale"),
        ({"crop_ratio": (0, 1)}, "crop_ratio must be two positive numbers"),
        ({"crop_ratio": (2, 1)}, "crop_ratio"),
        ({"flip_probability": -0.1}, "flip_probability must be in 0..1, got -0.1"),
        ({"flip_probability": 1.1}, "flip_probability must be in 0..1, got 1.1"),
    ],
)
def test_config_is_checked(options: dict[str, Any], rule: str) -> None:
    """Values behind a range's end are refused with the rule and the value."""
    with pytest.raises(ValueError, match=rule):
        AugmentConfig(**options)


def test_copies_of_a_sample_are_drawn_apart() -> None:
    """In one batch each copy has the crop that it has alone, and another than the other copy."""
    draw = Draw(1, 2, np.array([4, 7, 4, 7]), np.array([0, 0, 1, 1]))
    sizes = np.full(4, 500), np.full(4, 375)
    together = random_crops(draw, *sizes, AugmentConfig()).boxes
    for copy in (0, 1):
        alone = draw_of(np.array([4, 7]), seed=1, epoch=2, copy=copy)
        part = random_crops(alone, sizes[0][:2], sizes[1][:2], AugmentConfig()).boxes
        assert np.array_equal(part, together[2 * copy : 2 * copy + 2])
    assert not np.array_equal(together[:2], together[2:])


@pytest.mark.parametrize("probability", [0, 0.1, 1])
def test_erasing_is_torchvisions(probability: float) -> None:
    """As often as asked, inside the image, areas and ratios distributed as torchvision's are."""
    config = AugmentConfig(erase_probability=probability)
    boxes = erased_boxes(draw_of(np.arange(4000)), config, 64)
    erased = boxes[:, 2] > boxes[:, 0]
    assert abs(erased.mean() - probability) <= 0.02
    assert boxes.min() >= 0
    assert boxes.max() <= 64
    if probability == 1:
        w, h = (boxes[:, 2] - boxes[:, 0])[erased], (boxes[:, 3] - boxes[:, 1])[erased]
        image = torch.zeros(3, 64, 64)
        theirs = np.array(
            [
                RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[2:4]
                for _ in range(4000)
            ]
        )
        assert distance((w * h).astype(float), theirs.prod(axis=1).astype(float)) < 0.05
        assert distance(h / w, theirs[:, 0] / theirs[:, 1]) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "augmix"},
        {"policy_magnitude": 31},
        {"policy_ops": 0},
        {"erase_probability": 1.5},
    ],
)
def test_values_out_of_range(options: dict[str, Any]) -> None:
    """Each is refused with its name and value."""
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        AugmentConfig(**options)
