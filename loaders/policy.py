"""What is done to an image after it was cut out: torchvision's policies, and erasing.

The policies draw from torch's global generator. Each image gets a seed of its own before, and the
generator's state is put back after the batch, so pixels depend on the sample's names alone.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from loaders.augment import AugmentConfig, Draw, erased_boxes
from sharding.streams import Purpose

Pixels = npt.NDArray[np.uint8]

MEAN_COLOUR = (124, 116, 104)
"""ImageNet's, rounded: zero after normalization, which is what torchvision erases with."""


def finish(images: Pixels, draw: Draw, config: AugmentConfig) -> None:
    """Apply policy and erasing to a batch in its place: (N, size, size, 3)."""
    if config.policy != "none":
        _apply(_policy(config), images, draw)
    if config.erase_probability:
        boxes = erased_boxes(draw, config, images.shape[1])
        for image, (left, top, right, bottom) in zip(images, boxes.tolist(), strict=True):
            image[top:bottom, left:right] = MEAN_COLOUR


def _apply(policy: Callable[[Image.Image], Image.Image], images: Pixels, draw: Draw) -> None:
    seeds = draw.bits(Purpose.POLICY, 1)[:, 0] >> np.uint64(1)
    generator = torch.default_generator
    before = generator.get_state()
    try:
        for image, seed in zip(images, seeds.tolist(), strict=True):
            generator.manual_seed(seed)
            image[:] = np.asarray(policy(Image.fromarray(image)))
    finally:
        generator.set_state(before)


@lru_cache
def _policy(config: AugmentConfig) -> Callable[[Image.Image], Image.Image]:
    # Imported where it is used: a second in each worker that needs none of it.
    from torchvision.transforms import InterpolationMode, v2  # noqa: PLC0415

    bilinear = InterpolationMode.BILINEAR
    policy: Callable[[Image.Image], Image.Image]
    if config.policy == "randaugment":
        policy = v2.RandAugment(config.policy_ops, config.policy_magnitude, interpolation=bilinear)
    elif config.policy == "trivialaugment":
        policy = v2.TrivialAugmentWide(interpolation=bilinear)
    else:
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=bilinear)
    return policy
