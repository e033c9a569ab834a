"""model/schedule.py against closed forms and torch's own schedules."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from model.schedule import ScheduleConfig, lr_at

EPOCH_STEPS, EPOCHS, PEAK = 7, 10, 0.4


def rates(config: ScheduleConfig) -> list[float]:
    """The rate of every step of a run."""
    return [
        lr_at(step, config=config, peak_lr=PEAK, epoch_steps=EPOCH_STEPS, epochs=EPOCHS)
        for step in range(EPOCH_STEPS * EPOCHS)
    ]


def torch_rates(
    make: Callable[..., torch.optim.lr_scheduler.LRScheduler], steps: int, **options: float
) -> list[float]:
    """The rates of one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_without_warmup_is_torchs_cosine_annealing() -> None:
    """Half a cosine from the peak to the floor over all steps."""
    config = ScheduleConfig(name="cosine", warmup_epochs=0, final_factor=0.1)
    expected = torch_rates(
        torch.optim.lr_scheduler.CosineAnnealingLR,
        EPOCH_STEPS * EPOCHS,
        T_max=EPOCH_STEPS * EPOCHS,
        eta_min=PEAK * 0.1,
    )
    assert rates(config) == pytest.approx(expected)


def test_step_is_torchs_step_lr_counted_in_epochs() -> None:
    """The rate is multiplied each time step_epochs are over."""
    config = ScheduleConfig(name="step", warmup_epochs=0, step_epochs=3, step_gamma=0.1)
    expected = torch_rates(
        torch.optim.lr_scheduler.StepLR, EPOCH_STEPS * EPOCHS, step_size=3 * EPOCH_STEPS, gamma=0.1
    )
    assert rates(config) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_warmup_is_a_straight_line_to_the_peak(name: str) -> None:
    """From warmup_factor to the full rate, which is reached when the warm-up is over."""
    found = rates(ScheduleConfig(name=name, warmup_epochs=2, warmup_factor=0.25))
    assert found[0] == pytest.approx(0.25 * PEAK)
    assert found[EPOCH_STEPS] == pytest.approx((0.25 + 0.75 / 2) * PEAK)
    assert found[2 * EPOCH_STEPS] == pytest.approx(PEAK)


def test_cosine_ends_at_the_floor_and_stays_there() -> None:
    """Steps behind the planned end keep the last rate."""
    config = ScheduleConfig(warmup_epochs=1, final_factor=0.2)
    for step in (EPOCH_STEPS * EPOCHS, EPOCH_STEPS * EPOCHS * 2):
        rate = lr_at(step, config=config, peak_lr=PEAK, epoch_steps=EPOCH_STEPS, epochs=EPOCHS)
        assert math.isclose(rate, 0.2 * PEAK)


def test_piecewise_is_ffcvs() -> None:
    """The interpolation by epochs, as FFCV's recipes define it, at every step."""
    config = ScheduleConfig(name="piecewise", points=[[0, 0], [2, 1], [EPOCHS, 0]])
    epochs = np.arange(EPOCHS * EPOCH_STEPS) / EPOCH_STEPS
    assert rates(config) == pytest.approx(PEAK * np.interp(epochs, [0, 2, EPOCHS], [0, 1, 0]))


def test_piecewise_keeps_the_ends_factors_outside() -> None:
    """Before the first and behind the last point, and with a single one."""
    found = rates(ScheduleConfig(name="piecewise", points=[[2, 0.5], [3, 1], [4, 0.25]]))
    assert found[0] == found[2 * EPOCH_STEPS] == PEAK / 2
    assert found[3 * EPOCH_STEPS] == PEAK
    assert found[4 * EPOCH_STEPS] == found[-1] == PEAK / 4
    assert set(rates(ScheduleConfig(name="piecewise", points=[[2, 0.5]]))) == {PEAK / 2}


@pytest.mark.parametrize("name", ["constant", "plateau"])
def test_constant_stays_at_the_peak(name: str) -> None:
    """After the warm-up; what a plateau makes of it depends on validations."""
    found = rates(ScheduleConfig(name=name, warmup_epochs=1))
    assert set(found[EPOCH_STEPS:]) == {PEAK}
    assert found[0] == pytest.approx(0.01 * PEAK)


@pytest.mark.parametrize("name", ["cosine", "step", "constant", "piecewise"])
def test_the_peak_is_a_factor_to_the_bit(name: str) -> None:
    """So a rate that is found later gives what the same rate in the recipe gives."""
    config = ScheduleConfig(name=name, points=[[0, 0.1], [3, 1], [9, 0.3]], final_factor=0.1)
    for step, rate in enumerate(rates(config)):
        factor = lr_at(step, config=config, peak_lr=1.0, epoch_steps=EPOCH_STEPS, epochs=EPOCHS)
        assert PEAK * factor == rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin"}, "got 'cosin'"),
        ({"warmup_epochs": -1}, "got -1"),
        ({"step_epochs": 0}, "and 0"),
        ({"step_gamma": 1.5}, "step_gamma must be in 0..1, got 1.5"),
        ({"warmup_factor": -0.1}, "warmup_factor must be in 0..1"),
        ({"name": "piecewise"}, "piecewise needs points"),
        ({"points": [[0, 1], [0, 2]]}, "rising epochs"),
        ({"points": [[0, -1]]}, "got ..0, -1"),
        ({"points": [[0, 1, 2]]}, "points must be"),
        ({"plateau_monitor": "val/acc5"}, "must be val/loss or val/acc1, got 'val/acc5'"),
        ({"plateau_gamma": 1.0}, "plateau_gamma must be less than 1"),
        ({"plateau_patience": -1}, "and -1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    """An error names the field and the value."""
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**options)  # type: ignore[arg-type]
