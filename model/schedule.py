"""PURE: the learning rate as a function of the optimizer step."""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

NAMES = ("cosine", "step", "piecewise", "constant", "plateau")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a decay. Times are in epochs, factors are parts of the full rate."""

    name: str = "cosine"
    warmup_epochs: float = 5.0
    """Of all but piecewise, whose points say it."""
    warmup_factor: float = 0.01
    """The first step's rate, as a part of the full one."""
    final_factor: float = 0.0
    """Where the cosine ends, and below what plateau does not go."""
    step_epochs: int = 30
    """The step schedule multiplies by step_gamma each time so many epochs are over."""
    step_gamma: float = 0.1
    points: list[list[float]] = field(default_factory=list)
    """Of piecewise: [epoch, factor] pairs, joined by straight lines."""
    plateau_monitor: str = "val/loss"
    """plateau multiplies by plateau_gamma when val/loss or val/acc1 is no better ..."""
    plateau_patience: int = 10
    """... than the best for more than so many validations."""
    plateau_gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}")
        if self.warmup_epochs < 0 or self.step_epochs < 1:
            raise ValueError(
                f"warmup_epochs must be at least 0 and step_epochs at least 1, got "
                f"{self.warmup_epochs} and {self.step_epochs}"
            )
        for name in ("warmup_factor", "final_factor", "step_gamma", "plateau_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.plateau_gamma == 1 or self.plateau_patience < 0:
            raise ValueError(
                f"plateau_gamma must be less than 1 and plateau_patience at least 0, got "
                f"{self.plateau_gamma} and {self.plateau_patience}"
            )
        if self.plateau_monitor not in {"val/loss", "val/acc1"}:
            raise ValueError(
                f"plateau_monitor must be val/loss or val/acc1, got {self.plateau_monitor!r}"
            )
        if any(len(point) != 2 or point[1] < 0 for point in self.points) or any(
            after[0] <= before[0] for before, after in pairwise(self.points)
        ):
            raise ValueError(
                "points must be [epoch, factor] with rising epochs and factors of at least 0, "
                f"got {self.points}"
            )
        if self.name == "piecewise" and not self.points:
            raise ValueError("piecewise needs points, got []")


def lr_at(
    step: int, *, config: ScheduleConfig, peak_lr: float, epoch_steps: int, epochs: int
) -> float:
    """The rate of optimizer step 0, 1, ... of a run of epochs * epoch_steps steps.

    Warm-up:   from warmup_factor * peak_lr in a straight line, reaching peak_lr at its end.
    cosine:    (1 + cos(pi * t)) / 2 with t from 0 at the warm-up's end to 1 at the run's end.
    step:      step_gamma ** (epoch // step_epochs), epochs counted from the run's beginning.
    piecewise: between the points beside the step; the first's and the last's factor outside.
    constant:  1. So is plateau, whose decay depends on what validations find (model/plateau.py).
    """
    if config.name == "piecewise":
        return peak_lr * _between(config.points, step / epoch_steps)
    warmup = config.warmup_epochs * epoch_steps
    if step < warmup:
        return peak_lr * (config.warmup_factor + (1 - config.warmup_factor) * step / warmup)
    if config.name in {"constant", "plateau"}:
        return peak_lr
    if config.name == "step":
        return float(peak_lr * config.step_gamma ** (step // epoch_steps // config.step_epochs))
    done = min((step - warmup) / max(epochs * epoch_steps - warmup, 1), 1.0)
    floor = config.final_factor
    return peak_lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def _between(points: list[list[float]], epoch: float) -> float:
    """The factor at an epoch on the line through the points."""
    behind = bisect_right([at for at, _ in points], epoch)
    if behind in {0, len(points)}:
        return points[max(behind - 1, 0)][1]
    (left, low), (right, high) = points[behind - 1 : behind + 1]
    return low + (high - low) * (epoch - left) / (right - left)
