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

POLICIES = ("none", "randaugment", "trivialaugment", "autoaugment")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random-resized crop and flip, as in torchvision; see the recipes for values."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height."""
    flip_probability: float = 0.5
    policy: str = "none"
    """torchvision's RandAugment, TrivialAugmentWide or AutoAugment (ImageNet's), after crop and
    flip: randaugment, trivialaugment, autoaugment."""
    policy_magnitude: int = 9
    """Of randaugment, 0 to 30."""
    policy_magnitude_std: float = 0.0
    """Standard deviation of the magnitude, which is drawn for each operation, as in timm."""
    policy_ops: int = 2
    """Of randaugment: operations on each image."""
    erase_probability: float = 0.0
    """Random erasing (arXiv:1708.04896): a rectangle is filled with ImageNet's mean colour."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if not 0 <= self.policy_magnitude <= 30 or self.policy_ops < 1:
            raise ValueError(
                f"policy_magnitude must be in 0..30 and policy_ops at least 1, got "
                f"{self.policy_magnitude} and {self.policy_ops}"
            )
        if not 0 <= self.policy_magnitude_std <= 30:
            raise ValueError(
                f"policy_magnitude_std must be in 0..30, got {self.policy_magnitude_std}"
            )
        if not 0 <= self.erase_probability <= 1:
            raise ValueError(f"erase_probability must be in 0..1, got {self.erase_probability}")
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


class Draw(NamedTuple):
    """Names the random numbers of a batch's samples."""

    seed: int
    epoch: int
    numbers: Integers
    """(N,): the samples' numbers in the data set."""
    copies: Integers
    """(N,): which of its repetitions in the batch a sample is, from 0."""

    def bits(self, purpose: Purpose, draws: int) -> npt.NDArray[np.uint64]:
        """(N, draws) random words, a row for each sample: a function of its names alone.

        Each row is a SplitMix64 sequence (Steele, Lea, Flood 2014) that starts at a hash of the
        sample's identity under a key of Philox words; a Philox stream for each sample would cost
        more than reading it.
        """
        starts = np.empty(len(self.numbers), np.uint64)
        for copy in np.unique(self.copies).tolist():
            here = self.copies == copy
            key, salt = raw(2, seed=self.seed, purpose=purpose, epoch=self.epoch, item=copy)
            starts[here] = _mix(_mix(self.numbers[here].astype(np.uint64) + key) ^ salt)
        steps = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mix(starts[:, None] + steps)

    def uniforms(self, purpose: Purpose, draws: int) -> Floats:
        """(N, draws) numbers in [0, 1)."""
        return (self.bits(purpose, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_crops(draw: Draw, widths: Integers, heights: Integers, config: AugmentConfig) -> Crops:
    """Boxes of torchvision's RandomResizedCrop and flips, for the samples of a batch.

    Of ten boxes drawn by area (uniform) and ratio (log-uniform) the first that fits is taken; if
    none does, the largest central box of an allowed ratio.
    """
    draws = draw.uniforms(Purpose.AUGMENT, _DRAWS)
    area, ratio, across, down = draws[:, :-1].reshape(-1, 4, _ATTEMPTS).transpose(1, 0, 2)
    low, high = config.crop_scale
    areas = (widths * heights)[:, None] * (low + area * (high - low))
    low, high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    ratios = np.exp(low + ratio * (high - low))
    box_w = np.rint(np.sqrt(areas * ratios))
    box_h = np.rint(np.sqrt(areas / ratios))
    fits = (box_w >= 1) & (box_w <= widths[:, None]) & (box_h >= 1) & (box_h <= heights[:, None])
    rows, first = np.arange(len(widths)), fits.argmax(axis=1)
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


def erased_boxes(draw: Draw, config: AugmentConfig, size: int) -> Integers:
    """(N, 4): left, top, right, bottom of what is erased of size x size pixels; 0 where nothing.

    As torchvision's RandomErasing: 2% to 33% of the area, ratio 0.3 to 3.3; of ten boxes the first
    that fits inside is taken.
    """
    draws = draw.uniforms(Purpose.ERASE, _DRAWS)
    area, ratio, across, down = draws[:, :-1].reshape(-1, 4, _ATTEMPTS).transpose(1, 0, 2)
    areas = size * size * (0.02 + area * (0.33 - 0.02))
    ratios = np.exp(math.log(0.3) + ratio * (math.log(3.3) - math.log(0.3)))
    high, wide = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (high < size) & (wide < size)
    rows, first = np.arange(len(draws)), fits.argmax(axis=1)
    w, h = wide[rows, first], high[rows, first]
    left = np.floor(across[rows, first] * (size - w + 1))
    top = np.floor(down[rows, first] * (size - h + 1))
    erased = fits[rows, first] & (draws[:, -1] < config.erase_probability)
    boxes: Integers = np.stack([left, top, left + w, top + h], axis=1).astype(np.int64)
    boxes[~erased] = 0
    return boxes


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function, a bijection of 64-bit words."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
