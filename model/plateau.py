"""The schedule that is no function of the step: the rate falls when validations stand still."""

from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from model.schedule import ScheduleConfig


class Plateau:
    """torch's ReduceLROnPlateau over a factor of the rate, which the schedule multiplies by it.

    On an optimizer of its own, so that it can be joined with a warm-up, and is stepped behind each
    validation before a checkpoint is written: one that is resumed there has not missed the step.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.monitor = config.plateau_monitor
        self._rate = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._scheduler = ReduceLROnPlateau(
            self._rate,
            mode="min" if self.monitor == "val/loss" else "max",
            factor=config.plateau_gamma,
            patience=config.plateau_patience,
            min_lr=config.final_factor,
        )

    @property
    def factor(self) -> float:
        """What the rate is multiplied by now."""
        return float(self._rate.param_groups[0]["lr"])

    def step(self, metric: float) -> None:
        """Take a validation's result into account; the same one on every rank."""
        self._scheduler.step(metric)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the factor, the best result, and how long ago it was."""
        names = ("best", "num_bad_epochs", "last_epoch")
        return {"factor": self.factor} | {name: getattr(self._scheduler, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            if name == "factor":
                self._rate.param_groups[0]["lr"] = value
            else:
                setattr(self._scheduler, name, value)
