"""Networks by name."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import stochastic_depth

from model.blurpool import blur_strided
from model.resnet9 import build_resnet9

NAMES = ("resnet9", "resnet10", *torchvision.models.list_models(module=torchvision.models))
# Networks that would also return what their side branches say.
_SIDE_BRANCHES = ("googlenet", "inception_v3")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A classification network of torchvision; the switches, but compile and sync_bn, are ResNets'.

    resnet10 is one basic block a stage, for small images and tests; resnet9 is that of CIFAR-10.
    """

    name: str = "resnet50"
    width: int = 64
    """resnet9: channels of its first layer."""
    small_stem: bool = False
    """A 3x3 convolution of stride 1 and no pooling, for images of 32 pixels or so."""
    zero_init: bool = False
    """Residual blocks begin as the identity: the last norm's weight is 0 (arXiv:1706.02677)."""
    blurpool: bool = False
    """Blur in front of strided convolutions."""
    drop_path: float = 0.0
    """Stochastic depth: the last block's probability to be skipped by a sample; the others' rise to
    it in a line from the first's 0."""
    dropout: float = 0.0
    """In front of the last layer."""
    prior_bias: bool = False
    """Begin with the classes' prior probability in the last bias, for binary cross-entropy."""
    sync_bn: bool = False
    """Normalize by statistics over all processes; on GPUs."""
    compile: bool = False
    """torch.compile the network when it first runs."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            near = ", ".join(difflib.get_close_matches(self.name, NAMES))
            raise ValueError(
                "name must be one of torchvision's classification networks, resnet9 or resnet10; "
                f"got {self.name!r}" + (f", near: {near}" if near else "")
            )
        for field in ("drop_path", "dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if not self.is_resnet:
            for field in (
                "small_stem", "zero_init", "blurpool", "drop_path", "dropout", "prior_bias",
            ):  # fmt: skip
                if getattr(self, field):
                    raise ValueError(f"{field} is for ResNets, got name {self.name!r}")

    @property
    def is_resnet(self) -> bool:
        """Whether it is built of torchvision's residual blocks."""
        return self.name.startswith(("resnet", "resnext", "wide_resnet")) and (
            self.name != "resnet9"
        )


def misfit(saved: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> str | None:
    """How saved weights differ from a network's, by name or shape; None if they fit."""
    for name in sorted(saved.keys() | here.keys()):
        if name not in saved:
            return f"it has no {name}"
        if name not in here:
            return f"it has {name}, which is not of this network"
        if saved[name].shape != here[name].shape:
            return f"its {name} is {tuple(saved[name].shape)}, here {tuple(here[name].shape)}"
    return None


def build_network(config: NetworkConfig, classes: int) -> nn.Module:
    """A freshly initialized network: (N, 3, H, W) float -> (N, classes) logits."""
    network: nn.Module
    if config.is_resnet:
        network = _resnet(config, classes)
    elif config.name == "resnet9":
        network = build_resnet9(classes, config.width)
    else:
        options: dict[str, Any] = {}
        if config.name in _SIDE_BRANCHES:
            options = {"aux_logits": False, "init_weights": True}
        network = torchvision.models.get_model(
            config.name, weights=None, num_classes=classes, **options
        )
    if config.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    if config.drop_path:  # behind sync_bn, whose modules are new ones
        _add_drop_path(network, config.drop_path)
    if config.compile:
        network.compile()  # in place: its weights keep their names in checkpoints
    return network


def _resnet(config: NetworkConfig, classes: int) -> ResNet:
    """A ResNet with its switches but for stochastic depth."""
    network: ResNet
    if config.name == "resnet10":
        network = ResNet(
            BasicBlock, [1, 1, 1, 1], num_classes=classes, zero_init_residual=config.zero_init
        )
    else:
        network = torchvision.models.get_model(
            config.name, weights=None, num_classes=classes, zero_init_residual=config.zero_init
        )
    if config.small_stem:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    if config.blurpool:
        blur_strided(network)
    if config.dropout:  # here, where the weights keep their names
        network.avgpool = nn.Sequential(network.avgpool, nn.Dropout(config.dropout))
    if config.prior_bias:
        nn.init.constant_(network.fc.bias, -math.log(classes))
    return network


def _add_drop_path(network: nn.Module, most: float) -> None:
    """Drop whole residual branches, samples apart, by hooks: the weights keep their names."""
    blocks = [block for block in network.modules() if isinstance(block, BasicBlock | Bottleneck)]
    for number, block in enumerate(blocks):
        norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        norm.register_forward_hook(partial(_drop, most * number / max(len(blocks) - 1, 1)))


def _drop(probability: float, norm: nn.Module, _: Any, branch: torch.Tensor) -> torch.Tensor:
    kept: torch.Tensor = stochastic_depth(branch, probability, "row", norm.training)
    return kept
