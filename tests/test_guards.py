"""model/guards.py: a lost run stops, with its samples named and its checkpoint kept."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.guards import DivergedError, DivergenceGuard, ExpectedConfig

NAN, INF = math.nan, math.inf
MODULE: Any = SimpleNamespace(device=torch.device("cpu"))


class Run:
    """A guard, and a trainer that takes one step a batch; the losses are the test's."""

    def __init__(self, accumulate: int = 1, **options: Any) -> None:
        self.guard = DivergenceGuard(**({"every_n_steps": 4} | options))
        trainer: Any = SimpleNamespace(
            global_step=0, current_epoch=2, global_rank=0, world_size=1, is_global_zero=True
        )
        self.trainer = trainer
        self.batches = 0
        self.accumulate = accumulate
        self.guard.on_train_start(self.trainer, MODULE)

    def take(self, *losses: float) -> None:
        """Train a batch for each loss."""
        for loss in losses:
            batch: Any = SimpleNamespace(numbers=torch.tensor([self.batches, 100 + self.batches]))
            self.guard.on_train_batch_start(self.trainer, MODULE, batch, 0)
            self.batches += 1
            self.trainer.global_step = self.batches // self.accumulate
            self.guard.on_train_batch_end(
                self.trainer, MODULE, {"loss": torch.tensor(loss)}, batch, 0
            )


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_the_first_bad_batch_is_named_at_the_next_check(loss: float) -> None:
    """Its step, loss and samples, though later ones were bad as well."""
    run = Run()
    run.take(1.0, 2.0, 1.0, 1.0, 1.0)
    run.take(loss, NAN)
    with pytest.raises(
        DivergedError, match=f"loss was {loss} in epoch 2, step 5; .*: number 5, number 105$"
    ):
        run.take(NAN)


def test_finite_losses_pass() -> None:
    """However large; and a check forgets the batches before it."""
    run = Run()
    run.take(*[1e30] * 40)
    run.guard.on_validation_start(run.trainer, MODULE)
    assert run.guard._recent == []


@pytest.mark.parametrize("hook", ["on_validation_start", "on_save_checkpoint"])
def test_neither_validation_nor_checkpoint_comes_before_the_check(hook: str) -> None:
    """The hook raises, so that the last good checkpoint is not replaced."""
    run = Run()
    run.take(1.0, NAN)
    with pytest.raises(DivergedError, match="step 1;"):
        getattr(run.guard, hook)(*[run.trainer, MODULE, {}][: 3 if "save" in hook else 2])


def test_accumulated_batches_are_checked_where_the_step_ends() -> None:
    """A check in its middle would come twice; the micro-batch that was bad is named."""
    run = Run(accumulate=2)
    run.take(*[1.0] * 6, NAN)
    with pytest.raises(DivergedError, match=r"step 3; .*: number 6, number 106$"):
        run.take(1.0)


def test_the_report_holds_every_sample(tmp_path: Path) -> None:
    """The line names a few, by their keys."""
    report = tmp_path / "run" / "diverged.json"
    run = Run(
        every_n_steps=1, report=report, keys_of=lambda numbers: [f"key{n}" for n in numbers] * 10
    )
    with pytest.raises(DivergedError, match=r"key0, .*, \.\.\. \(20 samples\); all in .*\.json"):
        run.take(NAN)
    expected = {"rank": 0, "loss": "nan", "keys": ["key0", "key100"] * 10}
    assert json.loads(report.read_text()) == {"epoch": 2, "step": 0, "ranks": [expected]}


@pytest.mark.parametrize(
    ("band", "metrics", "complaint"),
    [
        ((0.75, 0.76), {"val/acc1": 0.7512}, None),
        ((0.75, 0.76), {"val/acc1": 0.7}, "0.7000 is below what the recipe gave others, 0.7500 to"),
        ((0.75, 0.76), {"val/acc1": 0.77}, "0.7700 is above .* 0.7500 to 0.7600"),
        ((0.75, 0.76), {"val/acc1": 0.7, "val_ema/acc1": 0.755}, None),
        ((0.75, None), {"val/acc1": 0.99}, None),
        ((None, None), {"val/acc1": 0.1}, None),
        ((0.75, 0.76), {}, None),
    ],
)
def test_an_accuracy_outside_the_recipes_band_is_told(
    band: tuple[float | None, float | None], metrics: dict[str, float], complaint: str | None
) -> None:
    """Of the better of weights and average; without a band there is nothing to say."""
    told = ExpectedConfig(accuracy_min=band[0], accuracy_max=band[1]).complaint(metrics)
    if complaint is None:
        assert told is None
    else:
        with pytest.raises(ValueError, match=complaint):
            raise ValueError(told)


@pytest.mark.parametrize("band", [(0.8, 0.7), (-0.1, 0.7), (0.7, 76.1)])
def test_a_band_that_is_none_is_refused(band: tuple[float, float]) -> None:
    """In the wrong order, or in percent."""
    with pytest.raises(ValueError, match=r"must be in 0..1 and in order, got"):
        ExpectedConfig(accuracy_min=band[0], accuracy_max=band[1])
