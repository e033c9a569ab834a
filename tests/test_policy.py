"""Policies: torchvision's results, and a function of the sample's names alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from loaders.augment import AugmentConfig, Draw, erased_boxes
from loaders.policy import MEAN_COLOUR, finish, magnitudes
from sharding.streams import Purpose
from tests.make_shards import picture

POLICIES = ("randaugment", "trivialaugment", "autoaugment")


def batch(size: int = 24, count: int = 6) -> np.ndarray:
    """Pictures as a decoder leaves them."""
    return np.stack([np.asarray(picture(n, size, size)) for n in range(count)])


def draw_of(numbers: list[int], epoch: int = 0, copy: int = 0) -> Draw:
    """These samples."""
    return Draw(5, epoch, np.array(numbers), np.full(len(numbers), copy))


def finished(policy: str, draw: Draw, **options: Any) -> np.ndarray:
    """The pictures of these samples, after a policy."""
    images = batch()[draw.numbers % 6]
    finish(images, draw, AugmentConfig(policy=policy, **options))
    return images


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_a_function_of_the_samples_names(policy: str) -> None:
    """The same in any batch and order, another one in another epoch and copy."""
    whole = finished(policy, draw_of(list(range(6))))
    assert not np.array_equal(whole, batch())
    for part in ([4], [3, 1], [5, 0, 2]):
        assert np.array_equal(finished(policy, draw_of(part)), whole[part])
    for other in (draw_of(list(range(6)), epoch=1), draw_of(list(range(6)), copy=1)):
        assert not np.array_equal(finished(policy, other), whole)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_torchvisions(policy: str) -> None:
    """With the sample's seed, torchvision's transform gives the same pixels."""
    theirs = {
        "randaugment": v2.RandAugment(3, 11, interpolation=InterpolationMode.BILINEAR),
        "trivialaugment": v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
        "autoaugment": v2.AutoAugment(interpolation=InterpolationMode.BILINEAR),
    }[policy]
    draw = draw_of(list(range(6)))
    ours = finished(policy, draw, policy_ops=3, policy_magnitude=11)
    seeds = draw.bits(Purpose.POLICY, 1)[:, 0] >> np.uint64(1)
    for image, seed, made in zip(batch(), seeds.tolist(), ours, strict=True):
        torch.manual_seed(seed)
        assert np.array_equal(np.asarray(theirs(Image.fromarray(image))), made)


def test_magnitudes_vary_around_the_configured_one() -> None:
    """Normal by the sample's names, one for each operation, none outside of 0..30."""
    config = AugmentConfig(
        policy="randaugment", policy_magnitude=21, policy_magnitude_std=1.5, policy_ops=2
    )
    draw = draw_of(list(range(4000)))
    found = magnitudes(config, draw)
    assert found.shape == (4000, 2)
    assert abs(found.mean() - 21) < 0.05
    assert abs(found.std() - 1.5) < 0.1  # rounding adds a little
    assert not np.array_equal(found[:, 0], found[:, 1])
    assert np.array_equal(magnitudes(config, draw_of([7, 3])), found[[7, 3]])
    wide = magnitudes(replace(config, policy_magnitude_std=30.0), draw)
    assert (wide.min(), wide.max()) == (0, 30)


def test_varied_operations_are_torchvisions() -> None:
    """Each operation is RandAugment's own with one operation at the drawn magnitude."""
    draw = draw_of(list(range(6)))
    config = AugmentConfig(policy="randaugment", policy_magnitude=15, policy_magnitude_std=9.0)
    images = batch()
    finish(images, draw, config)
    seeds = draw.bits(Purpose.POLICY, 1)[:, 0] >> np.uint64(1)
    drawn = magnitudes(config, draw).tolist()
    for image, seed, each, made in zip(batch(), seeds.tolist(), drawn, images, strict=True):
        torch.manual_seed(seed)
        expected = Image.fromarray(image)
        for magnitude in each:
            expected = v2.RandAugment(1, magnitude, interpolation=InterpolationMode.BILINEAR)(
                expected
            )
        assert np.array_equal(np.asarray(expected), made)


def test_the_global_generator_is_as_before() -> None:
    """What the training process draws next does not depend on the loader, even after an error."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    finished("randaugment", draw_of([0, 1]))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="zip"):
        finish(batch(), draw_of([0]), AugmentConfig(policy="randaugment"))
    assert torch.equal(torch.get_rng_state(), before)


def test_erased_boxes_are_filled_and_nothing_else() -> None:
    """Each box has the mean colour; all other pixels are untouched."""
    draw = draw_of(list(range(6)))
    config = AugmentConfig(erase_probability=1)
    images = batch()
    finish(images, draw, config)
    for image, before, box in zip(images, batch(), erased_boxes(draw, config, 24), strict=True):
        left, top, right, bottom = box.tolist()
        assert np.all(image[top:bottom, left:right] == MEAN_COLOUR)
        image[top:bottom, left:right] = before[top:bottom, left:right]
        assert np.array_equal(image, before)
