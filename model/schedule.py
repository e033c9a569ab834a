"""PURE: the learning rate as a function of the optimizer step."""

import math
from dataclasses import dataclass

NAMES = ("cosine", "step")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then cosine decay or steps. Times are in epochs."""

    name: str = "cosine"
    warmup_epochs: float = 5.0
    warmup_factor: float = 0.01
    """The first step's rate, as a part of the full one."""
    final_factor: float = 0.0
    """Where the cosine ends, as a part of the full rate."""
    step_epochs: int = 30
    """The step schedule multiplies by step_gamma each time so many epochs are over."""
    step_gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}")
        if self.warmup_epochs < 0 or self.step_epochs < 1:
            raise ValueError(
                f"warmup_epochs must be at least 0 and step_epochs at least 1, got "
                f"{self.warmup_epochs} and {self.step_epochs}"
            )
        for field in ("warmup_factor", "final_factor", "step_gamma"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be in 0..1, got {getattr(self, field)}")


def lr_at(
    step: int, *, config: ScheduleConfig, peak_lr: float, epoch_steps: int, epochs: int
) -> float:
    """The rate of optimizer step 0, 1, ... of a run of epochs * epoch_steps steps.

    Warm-up: from warmup_factor * peak_lr in a straight line, reaching peak_lr at its end.
    cosine:  (1 + cos(pi * t)) / 2 with t from 0 at the warm-up's end to 1 at the run's end.
    step:    step_gamma ** (epoch // step_epochs), epochs counted from the run's beginning.
    """
    warmup = config.warmup_epochs * epoch_steps
    if step < warmup:
        return peak_lr * (config.warmup_factor + (1 - config.warmup_factor) * step / warmup)
    if config.name == "step":
        return float(peak_lr * config.step_gamma ** (step // epoch_steps // config.step_epochs))
    done = min((step - warmup) / max(epochs * epoch_steps - warmup, 1), 1.0)
    floor = config.final_factor
    return peak_lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
