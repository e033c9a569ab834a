"""ResNet-9, the small network for CIFAR-10 of the DAWNBench entries (D. Page, 2018)."""

import torch
from torch import nn


def build_resnet9(classes: int, width: int = 64) -> nn.Module:
    """(N, 3, 32, 32) float -> (N, classes) logits. width: channels of the first layer.

        32 px   conv w
        16 px   conv 2w, residual 2w
         8 px   conv 4w
         4 px   conv 8w, residual 8w, largest of each channel, linear

    94 million multiply-adds an image at width 32, 377 at 64. Larger images work, too.
    """
    return nn.Sequential(
        _conv(3, width),
        _conv(width, 2 * width, nn.MaxPool2d(2)),
        _Residual(2 * width),
        _conv(2 * width, 4 * width, nn.MaxPool2d(2)),
        _conv(4 * width, 8 * width, nn.MaxPool2d(2)),
        _Residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        _Scaled(8 * width, classes),
    )


def _conv(channels: int, out: int, *behind: nn.Module) -> nn.Module:
    """3x3 convolution, pooling, norm, ReLU. Pooling first: the norm then has a quarter to do."""
    conv = nn.Conv2d(channels, out, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, *behind, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = self.branch(images)
        return images + branch


class _Scaled(nn.Linear):
    """Logits an eighth of a linear layer's, as there: a gentler beginning for the same rate."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 0.125 * super().forward(features)
