"""model/loss.py against torch's and timm's losses."""

from typing import Any

import pytest
import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from torch.nn.functional import cross_entropy, one_hot

from model.loss import LossConfig, training_loss

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.arange(8) % 5


def mixed(weight: float) -> torch.Tensor:
    """(8, 5) soft labels: each label with its neighbour's."""
    dense = one_hot(LABELS, 5).float()
    return weight * dense + (1 - weight) * dense.roll(1, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    """Of labels and of soft ones."""
    config = LossConfig(label_smoothing=smoothing)
    for targets in (LABELS, mixed(0.3)):
        expected = cross_entropy(LOGITS, targets, label_smoothing=smoothing)
        torch.testing.assert_close(training_loss(LOGITS, targets, config), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("total", [False, True])
def test_bce_is_timms(smoothing: float, threshold: float | None, total: bool) -> None:
    """Of labels, and of soft ones that timm's mixup smooths before it mixes."""
    config = LossConfig(
        name="bce", label_smoothing=smoothing, bce_threshold=threshold, bce_sum=total
    )
    timms = BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=total)
    torch.testing.assert_close(training_loss(LOGITS, LABELS, config), timms(LOGITS, LABELS))
    smoothed = mixed(0.3) * (1 - smoothing) + smoothing / 5
    torch.testing.assert_close(training_loss(LOGITS, mixed(0.3), config), timms(LOGITS, smoothed))


def test_the_threshold_decides_what_counts() -> None:
    """With 0.2 both classes of a 0.3 : 0.7 mix are present, of 0.1 : 0.9 only one."""
    config = LossConfig(name="bce", bce_threshold=0.2)
    logits = one_hot(LABELS, 5).float() * 100 - 50
    assert training_loss(logits, mixed(0.9), config) < 1e-6
    assert training_loss(logits, mixed(0.7), config) == pytest.approx(50 / 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mse"}, "name must be one of cross_entropy, bce, got 'mse'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in .0, 1., got 1.0"),
        ({"bce_threshold": 1.0}, "bce_threshold must be in .0, 1., got 1.0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)
