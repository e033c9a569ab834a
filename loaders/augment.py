"""The random numbers of a sample, and the crop boxes and flips made of them, a batch at a time.

They are a function of (seed, epoch, sample, copy) alone, so a batch's pixels are the same whichever
worker of whichever rank makes them.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sharding.streams import Integers, Purpose, raw

Floats = npt.NDArray[np.float64]

_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries as many boxes before it takes the centre
_DRAWS = 4 * _ATTEMPTS + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random-resized crop and flip, as in torchvision; see the recipes for values."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height."""
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two numbers in 0..1, got {self.crop_scale}")
        if len(self.crop_ratio) != 2 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be two positive numbers, got {self.crop_ratio}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be in 0..1, got {self.flip_probability}")


class Crops(NamedTuple):
    """What each image of a batch is cut to before it is resized."""

    boxes: Floats
    """(N, 4): left, top, right, bottom, in pixels of the source."""
    flips: npt.NDArray[np.bool_]
    """(N,): mirror left and right."""
    exact: bool
    """False: crop, then resize, decoded at a reduced scale that covers the output (training).
    True: what cutting the box out of the whole resized image gives (evaluation)."""


def uniforms(numbers: Integers, *, seed: int, epoch: int, copy: int = 0) -> Floats:
    """(N, draws) numbers in [0, 1), one row a sample, of (seed, epoch, sample number, copy).

    Each row is a SplitMix64 sequence (Steele, Lea, Flood 2014) that starts at a hash of the
    sample's identity under a key of Philox words; a Philox stream for each sample would cost more
    than reading it.
    """
    key, salt = raw(2, seed=seed, purpose=Purpose.AUGMENT, epoch=epoch, item=copy)
    starts = _mix(_mix(numbers.astype(np.uint64) + key) ^ salt)
    steps = np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(starts[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_crops(
    numbers: Integers,
    widths: Integers,
    heights: Integers,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
) -> Crops:
    """Boxes of torchvision's RandomResizedCrop and flips, for the samples of a batch.

    Of ten boxes drawn by area (uniform) and ratio (log-uniform) the first that fits is taken; if
    none does, the largest central box of an allowed ratio.
    """
    draws = uniforms(numbers, seed=seed, epoch=epoch)
    area, ratio, across, down = draws[:, :-1].reshape(-1, 4, _ATTEMPTS).transpose(1, 0, 2)
    low, high = config.crop_scale
    areas = (widths * heights)[:, None] * (low + area * (high - low))
    low, high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    ratios = np.exp(low + ratio * (high - low))
    box_w = np.rint(np.sqrt(areas * ratios))
    box_h = np.rint(np.sqrt(areas / ratios))
    fits = (box_w >= 1) & (box_w <= widths[:, None]) & (box_h >= 1) & (box_h <= heights[:, None])
    rows, first = np.arange(len(numbers)), fits.argmax(axis=1)
    fitting = fits[rows, first]
    w, h = box_w[rows, first], box_h[rows, first]
    left = np.floor(across[rows, first] * (widths - w + 1))
    top = np.floor(down[rows, first] * (heights - h + 1))

    central_w = np.minimum(widths, np.rint(heights * config.crop_ratio[1]).clip(1))
    central_h = np.minimum(heights, np.rint(widths / config.crop_ratio[0]).clip(1))
    w, h = np.where(fitting, w, central_w), np.where(fitting, h, central_h)
    left = np.where(fitting, left, (widths - w) // 2)
    top = np.where(fitting, top, (heights - h) // 2)
    boxes = np.stack([left, top, left + w, top + h], axis=1)
    return Crops(boxes, draws[:, -1] < config.flip_probability, exact=False)


def centre_crops(widths: Integers, heights: Integers, *, resize: int, size: int) -> Crops:
    """Boxes of torchvision's Resize(resize) on the shorter side and CenterCrop(size)."""
    shorter = np.minimum(widths, heights)
    resized_w, resized_h = resize * widths // shorter, resize * heights // shorter
    left, top = np.rint((resized_w - size) / 2), np.rint((resized_h - size) / 2)
    scale_x, scale_y = widths / resized_w, heights / resized_h
    boxes = np.stack(
        [left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y], axis=1
    )
    return Crops(boxes, np.zeros(len(widths), np.bool_), exact=True)


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function, a bijection of 64-bit words."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
