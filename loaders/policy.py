"""What is done to an image after it was cut out: torchvision's policies, and erasing.

The policies draw from torch's global generator. Each image gets a seed of its own before, and the
generator's state is put back after the batch, so pixels depend on the sample's names alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from loaders.augment import AugmentConfig, Draw, erased_boxes
from sharding.streams import Integers, Purpose

Pixels = npt.NDArray[np.uint8]
Policy = Callable[[Image.Image], Image.Image]

MEAN_COLOUR = (124, 116, 104)
"""ImageNet's, rounded: zero after normalization, which is what torchvision erases with."""


def finish(images: Pixels, draw: Draw, config: AugmentConfig) -> None:
    """Apply policy and erasing to a batch in its place: (N, size, size, 3)."""
    if config.policy != "none":
        _apply(_policies(config, draw), images, draw)
    if config.erase_probability:
        boxes = erased_boxes(draw, config, images.shape[1])
        for image, (left, top, right, bottom) in zip(images, boxes.tolist(), strict=True):
            image[top:bottom, left:right] = MEAN_COLOUR


def _apply(policies: Sequence[Sequence[Policy]], images: Pixels, draw: Draw) -> None:
    """Each image's policies, one after the other."""
    seeds = draw.bits(Purpose.POLICY, 1)[:, 0] >> np.uint64(1)
    generator = torch.default_generator
    before = generator.get_state()
    try:
        for image, seed, each in zip(images, seeds.tolist(), policies, strict=True):
            generator.manual_seed(seed)
            made = Image.fromarray(image)
            for policy in each:
                made = policy(made)
            image[:] = np.asarray(made)
    finally:
        generator.set_state(before)


def magnitudes(config: AugmentConfig, draw: Draw) -> Integers:
    """(N, operations) of randaugment: normal around the configured one, rounded, in 0..30."""
    words = draw.bits(Purpose.POLICY, 1 + config.policy_ops)[:, 1:]  # the first one is the seed
    uniforms = ((words >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52  # neither 0 nor 1
    normal = np.vectorize(NormalDist(0, config.policy_magnitude_std).inv_cdf, otypes=[np.float64])
    found: Integers = np.clip(np.rint(config.policy_magnitude + normal(uniforms)), 0, 30)
    return found.astype(np.int64)


def _policies(config: AugmentConfig, draw: Draw) -> Sequence[Sequence[Policy]]:
    """What each image goes through."""
    if config.policy != "randaugment" or not config.policy_magnitude_std:
        return [[_policy(config)]] * len(draw.numbers)
    single = replace(config, policy_ops=1)
    return [
        [_policy(replace(single, policy_magnitude=magnitude)) for magnitude in each]
        for each in magnitudes(config, draw).tolist()
    ]


@lru_cache
def _policy(config: AugmentConfig) -> Policy:
    # Imported where it is used: a second in each worker that needs none of it.
    from torchvision.transforms import InterpolationMode, v2  # noqa: PLC0415

    bilinear = InterpolationMode.BILINEAR
    policy: Policy
    if config.policy == "randaugment":
        policy = v2.RandAugment(config.policy_ops, config.policy_magnitude, interpolation=bilinear)
    elif config.policy == "trivialaugment":
        policy = v2.TrivialAugmentWide(interpolation=bilinear)
    else:
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=bilinear)
    return policy
