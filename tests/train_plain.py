"""train.py with a small network without batch normalization.

What its gradients are is then the same on any number of processes, but for rounding. Started with
`python -m tests.train_plain`, for its own processes are started the same way.
"""

import sys
from unittest.mock import patch

from torch import nn

import train
from model.networks import NetworkConfig


def plain_network(config: NetworkConfig, classes: int) -> nn.Module:
    """(N, 3, H, W) -> (N, classes); whatever network the recipe names."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        nn.Linear(288, classes),
    )


if __name__ == "__main__":
    with patch("recipes.build.build_network", plain_network):
        sys.exit(train.main())
