"""model/optim.py: which optimizer, which weights decay, which rate."""

from typing import Any

import pytest
import torch
from timm.optim.lamb import Lamb
from torch import nn

from model.networks import NetworkConfig, build_network
from model.optim import OptimConfig, build_optimizer, param_groups


@pytest.mark.parametrize(
    ("config", "batch_size", "expected"),
    [
        (OptimConfig(base_lr=0.1), 256, 0.1),
        (OptimConfig(base_lr=0.1), 1024, 0.4),
        (OptimConfig(base_lr=0.1, lr=0.3), 1024, 0.3),  # --lr is the effective rate
        (OptimConfig(lr="3e-1"), 1024, 0.3),  # what YAML takes for text
        (OptimConfig(lr="auto"), 1024, 1.0),  # the finder's rate multiplies it
    ],
)
def test_the_rate_is_scaled_by_the_global_batch(
    config: OptimConfig, batch_size: int, expected: float
) -> None:
    """base_lr is for 256 images; lr stands as it is."""
    assert config.effective_lr(batch_size) == pytest.approx(expected)
    assert config.finds_lr == (config.lr == "auto")


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_norms_and_biases_decay_as_the_recipe_says(norms: bool, biases: bool) -> None:
    """A ResNet's convolutions and last weight always do; every weight is in one group."""
    network = build_network(NetworkConfig(name="resnet10"), 5)
    config = OptimConfig(norm_weight_decay=norms, bias_weight_decay=biases, weight_decay=0.3)
    names = {parameter: name for name, parameter in network.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in param_groups(config, network)
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    assert decay.keys() == set(names.values())
    assert (
        decay["conv1.weight"] == decay["fc.weight"] == decay["layer2.0.downsample.0.weight"] == 0.3
    )
    assert decay["fc.bias"] == (0.3 if biases else 0)
    for name in ("bn1.weight", "bn1.bias", "layer2.0.downsample.1.weight"):
        assert decay[name] == (0.3 if norms else 0)


def test_without_exceptions_or_decay_there_is_one_group() -> None:
    """As many kernels as needed."""
    assert len(param_groups(OptimConfig(), nn.BatchNorm1d(3))) == 1
    off = OptimConfig(weight_decay=0, norm_weight_decay=False)
    assert len(param_groups(off, nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(3)))) == 1


def test_the_names_give_torchs_sgd_and_timms_lamb() -> None:
    """With the recipe's options."""
    layer = nn.Linear(2, 2)
    sgd = build_optimizer(OptimConfig(momentum=0.8, nesterov=True), layer)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.8, True)
    lamb = build_optimizer(OptimConfig(name="lamb", weight_decay=0.02), layer)
    assert isinstance(lamb, Lamb)
    assert [group["weight_decay"] for group in lamb.param_groups] == [0.02]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"lr": "much"}, "lr must be a number, auto or null, got 'much'"),
        ({"momentum": -0.5}, "momentum must be at least 0, got -0.5"),
        ({"momentum": 0, "nesterov": True}, "nesterov needs momentum, got 0"),
        ({"name": "adam"}, "name must be one of sgd, lamb, got 'adam'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)
