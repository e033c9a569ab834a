"""Networks by name."""

from dataclasses import dataclass

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

NAMES = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A ResNet of torchvision; resnet10 is one basic block a stage, for small images and tests."""

    name: str = "resnet50"
    small_stem: bool = False
    """A 3x3 convolution of stride 1 and no pooling, for images of 32 pixels or so."""
    compile: bool = False
    """torch.compile the network when it first runs."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}")


def build_network(config: NetworkConfig, classes: int) -> nn.Module:
    """A freshly initialized network: (N, 3, H, W) float -> (N, classes) logits."""
    network: nn.Module
    if config.name == "resnet10":
        network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    else:
        network = torchvision.models.get_model(config.name, weights=None, num_classes=classes)
    if config.small_stem:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    if config.compile:
        network.compile()  # in place: its weights keep their names in checkpoints
    return network
