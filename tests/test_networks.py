"""model/networks.py: shapes, names, stems."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from model.networks import NAMES, NetworkConfig, build_network, misfit


@pytest.mark.parametrize("name", ["resnet9", "resnet10", "resnet18", "resnet50"])
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


def test_an_unknown_name_is_refused_with_the_near_ones() -> None:
    """The error lists what may have been meant."""
    with pytest.raises(ValueError, match="got 'resnet51', near: resnet"):
        NetworkConfig(name="resnet51")


@pytest.mark.parametrize(
    "name", ["googlenet", "inception_v3", "mobilenet_v3_small", "regnet_y_400mf", "squeezenet1_0"]
)
def test_other_networks_of_torchvision_train(name: str) -> None:
    """By their names, with one tensor of logits also where there are side branches."""
    assert name in NAMES
    network = build_network(NetworkConfig(name=name), 7).train()
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet10", "resnet50", "wide_resnet50_2"])
def test_zero_init_makes_blocks_the_identity(name: str) -> None:
    """The last norm of each residual branch has weight 0, and only that."""
    network = build_network(NetworkConfig(name=name, zero_init=True), 7)
    zero = {n for n, p in network.named_parameters() if p.ndim == 1 and not p.any()}
    last = "bn2" if name == "resnet10" else "bn3"
    assert {n for n in zero if n.endswith("weight")} == {
        n for n, _ in network.named_parameters() if n.endswith(f"{last}.weight")
    }


def test_stochastic_depth_skips_branches_of_samples() -> None:
    """In training a sample's branch is 0 or 1/(1-p) of itself, p rising block by block."""
    network = build_network(NetworkConfig(name="resnet18", drop_path=0.7), 7)
    plain = build_network(NetworkConfig(name="resnet18"), 7)
    branches: list[torch.Tensor] = []
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            norm = network.get_submodule(f"layer{stage}.{block}.bn2")
            norm.register_forward_hook(lambda _, __, branch: branches.append(branch.clone()))
    torch.manual_seed(0)
    network.train()(torch.randn(400, 3, 8, 8))
    dropped = [(branch.flatten(1) == 0).all(1).float().mean().item() for branch in branches]
    assert dropped[0] == 0
    assert dropped == pytest.approx([0.1 * i for i in range(8)], abs=0.07)

    plain.load_state_dict(network.state_dict())
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(network.eval()(images), plain.eval()(images))


def test_stochastic_depth_survives_copies_and_sync_bn() -> None:
    """An averaged model's copy and converted norms drop branches too."""
    network = build_network(NetworkConfig(name="resnet10", drop_path=0.9, sync_bn=True), 7)
    assert isinstance(network.get_submodule("layer4.0.bn2"), nn.SyncBatchNorm)
    copied = copy.deepcopy(network).get_submodule("layer4.0.bn2").train()
    torch.manual_seed(0)
    out = copied(torch.randn(50, 512, 2, 2))
    assert 0.7 < (out.flatten(1) == 0).all(1).float().mean() < 1


def test_dropout_keeps_the_weights_names() -> None:
    """It stands in front of the last layer and works in training only."""
    network = build_network(NetworkConfig(name="resnet10", dropout=0.5), 7)
    assert (
        network.state_dict().keys()
        == build_network(NetworkConfig(name="resnet10"), 7).state_dict().keys()
    )
    seen: list[torch.Tensor] = []
    network.get_submodule("fc").register_forward_hook(lambda _, args, __: seen.append(args[0]))
    images = torch.randn(8, 3, 32, 32)
    network.train()(images)
    network.eval()(images)
    dropped = [(features == 0).float().mean() for features in seen]
    assert dropped[0] > dropped[1] + 0.2


def test_the_prior_is_that_of_equal_classes() -> None:
    """The sigmoid of the last bias is 1 / classes, nearly."""
    network = build_network(NetworkConfig(name="resnet10", prior_bias=True), 1000)
    bias = network.get_parameter("fc.bias")
    torch.testing.assert_close(bias.exp(), torch.full((1000,), 1e-3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet51"}, "got 'resnet51'"),
        ({"drop_path": 1.0}, "drop_path must be in .0, 1., got 1.0"),
        ({"name": "resnet9", "zero_init": True}, "zero_init is for ResNets, got name 'resnet9'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"dropout": -0.1}, "dropout must be in .0, 1., got -0.1"),
        ({"name": "vit_b_16", "blurpool": True}, "blurpool is for ResNets, got name 'vit_b_16'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**options)


def test_what_does_not_fit_is_named() -> None:
    """A weight that is missing, one too many, one of another shape."""
    saved = {"a": torch.zeros(2), "b": torch.zeros(3, 4)}
    assert misfit(saved, dict(saved)) is None
    assert misfit({"a": torch.zeros(2)}, saved) == "it has no b"
    assert misfit(saved, {"b": torch.zeros(3, 4)}) == "it has a, which is not of this network"
    found = misfit(saved, {"a": torch.zeros(2), "b": torch.zeros(3, 5, device="meta")})
    assert found == "its b is (3, 4), here (3, 5)"
