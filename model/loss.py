"""Losses of logits against labels, or against the soft ones that mixup and cutmix make."""

from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

NAMES = ("cross_entropy", "bce")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy, or binary cross-entropy of each class, with smoothed labels."""

    name: str = "cross_entropy"
    label_smoothing: float = 0.0
    """This part of each sample's weight is spread evenly over all classes."""
    bce_threshold: float | None = None
    """bce: a class with more weight than this counts as present, one with less as absent."""
    bce_sum: bool = False
    """bce: the sum over the classes, not the mean."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.bce_threshold is not None and not 0 <= self.bce_threshold < 1:
            raise ValueError(f"bce_threshold must be in [0, 1), got {self.bce_threshold}")


def training_loss(logits: torch.Tensor, targets: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """The mean over a batch: (N, C) logits and (N,) labels or (N, C) soft labels -> ()."""
    if config.name == "cross_entropy":
        return cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
    classes = logits.shape[1]
    soft = one_hot(targets, classes) if targets.ndim == 1 else targets
    soft = soft.to(logits.dtype) * (1 - config.label_smoothing)
    soft += config.label_smoothing / classes
    if config.bce_threshold is not None:
        soft = soft.gt(config.bce_threshold).to(logits.dtype)
    mean = binary_cross_entropy_with_logits(logits, soft)
    return mean * classes if config.bce_sum else mean
