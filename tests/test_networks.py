"""model/networks.py: shapes, names, stems."""

import pytest
import torch
import torchvision

from model.networks import NAMES, NetworkConfig, build_network


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50"])
def test_a_network_maps_images_to_logits(name: str) -> None:
    """(N, 3, H, W) -> (N, classes)."""
    network = build_network(NetworkConfig(name=name), 7).eval()
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_resnet50_is_torchvisions() -> None:
    """Its weights fit torchvision's model, name for name and shape for shape."""
    ours = build_network(NetworkConfig(name="resnet50"), 1000).state_dict()
    theirs = torchvision.models.resnet50().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_the_small_stem_keeps_the_resolution() -> None:
    """A 32-pixel image reaches the first stage with 32 pixels, not 8."""
    network = build_network(NetworkConfig(name="resnet10", small_stem=True), 10)
    sizes = []
    network.get_submodule("layer1").register_forward_hook(
        lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[2:]))
    )
    network(torch.zeros(2, 3, 32, 32))
    assert sizes == [(32, 32)]


def test_compiling_keeps_the_weights_names() -> None:
    """A checkpoint of a compiled network fits one that is not, and the other way round."""
    plain, compiled = (
        build_network(NetworkConfig(name="resnet10", compile=on), 3) for on in (False, True)
    )
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    """The error lists what there is."""
    with pytest.raises(ValueError, match=f"{', '.join(NAMES)}, got 'resnet51'"):
        NetworkConfig(name="resnet51")
