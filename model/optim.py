"""Optimizers by name, and which weights decay."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NAMES = ("sgd", "lamb")
AUTO = "auto"
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD or LAMB. The learning rate is base_lr * global batch / 256, unless lr states it."""

    name: str = "sgd"
    base_lr: float = 0.1
    lr: int | float | str | None = None
    """The effective rate; auto: that of the learning rate finder."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    weight_decay: float = 1e-4
    norm_weight_decay: bool = True
    """Whether normalization layers decay too."""
    bias_weight_decay: bool = True
    """Whether the other layers' biases decay too."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}")
        if self.lr is not None and self.lr != AUTO:
            try:  # YAML takes 1e-3 for text
                object.__setattr__(self, "lr", float(self.lr))
            except ValueError as error:
                raise ValueError(f"lr must be a number, auto or null, got {self.lr!r}") from error
        for field in ("base_lr", "lr", "momentum", "weight_decay"):
            value = getattr(self, field)
            if value not in {None, AUTO} and not 0 <= value < math.inf:
                raise ValueError(f"{field} must be at least 0, got {value}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum, got 0")

    @property
    def finds_lr(self) -> bool:
        """Whether the rate has to be found first."""
        return self.lr == AUTO

    def effective_lr(self, global_batch: int) -> float:
        """The learning rate at the schedule's peak (linear scaling, arXiv:1706.02677).

        1 where the rate has to be found: the schedule then gives factors of it.
        """
        if self.lr is None:
            return self.base_lr * global_batch / 256
        return 1.0 if self.finds_lr else float(self.lr)


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of all of a module's weights; its rate has to be set before each step."""
    groups = param_groups(config, module)
    if config.name == "lamb":
        from timm.optim.lamb import Lamb  # noqa: PLC0415  (all of timm comes with it)

        return Lamb(groups, lr=1.0)
    return torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=config.nesterov)


def param_groups(config: OptimConfig, module: nn.Module) -> list[dict[str, object]]:
    """The weights that decay, and those that do not, if there are any."""
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: []}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if isinstance(layer, _NORMS):
                decays = config.norm_weight_decay
            else:
                decays = config.bias_weight_decay or name != "bias"
            groups.setdefault(config.weight_decay if decays else 0.0, []).append(parameter)
    return [{"params": p, "weight_decay": decay} for decay, p in groups.items() if p]
