"""model/blurpool.py: what FFCV's ResNets do in front of strided convolutions."""

import pytest
import torch
from torch import nn

from model.blurpool import BlurredConv2d, blur_strided
from model.networks import NetworkConfig, build_network


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_it_is_a_blur_and_then_the_convolution(kernel: int, padding: int) -> None:
    """FFCV's definition: a depthwise [[1,2,1],[2,4,2],[1,2,1]]/16 of stride 1, then the layer."""
    conv = nn.Conv2d(16, 4, kernel, stride=2, padding=padding, bias=False)
    images = torch.randn(2, 16, 9, 8)
    square = torch.tensor([[[[1, 2, 1], [2, 4, 2], [1, 2, 1]]]]) / 16.0
    expected = conv(nn.functional.conv2d(images, square.expand(16, 1, 3, 3), padding=1, groups=16))
    found = BlurredConv2d.of(conv)(images)
    torch.testing.assert_close(found, expected)
    assert found.shape == conv(images).shape


def test_a_resnet50_has_six_and_its_names() -> None:
    """One in the branch and one in the shortcut of three stages; the stem stays as it is."""
    plain, blurred = (build_network(NetworkConfig(blurpool=on), 5) for on in (False, True))
    names = [name for name, m in blurred.named_modules() if isinstance(m, BlurredConv2d)]
    assert names == [
        f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in ("conv2", "downsample.0")
    ]
    assert blurred.state_dict().keys() == plain.state_dict().keys()


def test_the_weights_are_those_of_the_convolution() -> None:
    """Nothing is drawn again: the same seed gives the same weights with and without."""
    network = nn.Sequential(nn.Conv2d(16, 4, 3, stride=2))
    weight = network[0].weight
    state = torch.get_rng_state()
    blur_strided(network)
    assert network[0].weight is weight
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_goes_through() -> None:
    """Under autocast too, where the images may be bfloat16 already."""
    layer = BlurredConv2d.of(nn.Conv2d(16, 4, 3, stride=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 16, 8, 8).bfloat16()).dtype == torch.bfloat16
