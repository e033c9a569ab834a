"""model/plateau.py against torch's own scheduler."""

import pytest
import torch

from model.plateau import Plateau
from model.schedule import ScheduleConfig

LOSSES = [3.0, 2.0, 2.1, 2.2, 1.9, 1.95, 2.0, 2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.1]


def config(**options: object) -> ScheduleConfig:
    """A plateau of patience 1."""
    values: dict[str, object] = {"name": "plateau", "plateau_patience": 1, "plateau_gamma": 0.5}
    return ScheduleConfig(**(values | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("monitor", ["val/loss", "val/acc1"])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_factors_are_torchs(monitor: str, floor: float) -> None:
    """Loss falls, accuracy rises; the factor ends at the floor."""
    plateau = Plateau(config(plateau_monitor=monitor, final_factor=floor))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        "min" if monitor == "val/loss" else "max",
        factor=0.5,
        patience=1,
        min_lr=0.3 * floor,
    )
    sign = 1 if monitor == "val/loss" else -1
    for loss in LOSSES:
        plateau.step(sign * loss)
        reference.step(sign * loss)
        assert 0.3 * plateau.factor == pytest.approx(optimizer.param_groups[0]["lr"])
    assert plateau.factor == pytest.approx(max(0.5**4, floor))


def test_it_goes_on_from_its_state() -> None:
    """After any validation."""
    whole, factors, states = Plateau(config()), [], []
    for loss in LOSSES:
        states.append(whole.state_dict())
        whole.step(loss)
        factors.append(whole.factor)
    for start, state in enumerate(states):
        resumed = Plateau(config())
        resumed.load_state_dict(state)
        found = []
        for loss in LOSSES[start:]:
            resumed.step(loss)
            found.append(resumed.factor)
        assert found == factors[start:]
