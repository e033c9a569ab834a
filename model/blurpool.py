"""Antialiased downsampling: strided convolutions that blur before they skip pixels."""

import torch
from torch import nn
from torch.nn.functional import conv2d

_LEAST_CHANNELS = 16  # below that is the stem, which sees the image itself


class BlurredConv2d(nn.Conv2d):
    """A convolution behind a 3x3 binomial filter (arXiv:1904.11486), as in FFCV's ResNets.

    Its weight has the name and shape of the plain convolution's.
    """

    blur: torch.Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "BlurredConv2d":
        """The convolution, with its own weights, and the filter in front."""
        blurred = cls(
            conv.in_channels,
            conv.out_channels,
            kernel_size=conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            device="meta",  # draws no random numbers: they come with conv's weights
        )
        blurred.weight, blurred.bias = conv.weight, conv.bias
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        square = (line[:, None] * line).expand(conv.in_channels, 1, 3, 3).contiguous()
        blurred.register_buffer("blur", square.to(conv.weight), persistent=False)
        return blurred

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H', W'), of the same shape as without the filter."""
        # Cast, for autocast does so only with convolutions' inputs and weights that need it.
        blurred = conv2d(images, self.blur.to(images.dtype), padding=1, groups=self.in_channels)
        return super().forward(blurred)


def blur_strided(network: nn.Module) -> None:
    """Replace each strided convolution behind the stem by its blurred form, in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if (
                type(child) is nn.Conv2d
                and max(child.stride) > 1
                and child.in_channels >= _LEAST_CHANNELS
            ):
                setattr(parent, name, BlurredConv2d.of(child))
