"""model/lr_finder.py: the ramp, the suggestion, and that nothing else changes."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from loaders.pipeline import Batch
from model.classifier import Classifier
from model.loss import LossConfig
from model.lr_finder import FinderConfig, Found, LRFinder, smooth, suggest
from model.mixup import MixConfig
from model.optim import OptimConfig
from tests.probes import Loader, Probe, batch

CONFIG = FinderConfig(steps=30, lr_min=1e-4, lr_max=100)


def test_the_ramp_is_exponential() -> None:
    """From the first to the last rate, each the same factor above the one before."""
    rates = [CONFIG.rate(step) for step in range(30)]
    assert (rates[0], rates[-1]) == pytest.approx((1e-4, 100))
    assert np.diff(np.log(rates)) == pytest.approx([math.log(1e6) / 29] * 29)


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    """It is corrected for its beginning."""
    assert smooth([3.0] * 7) == pytest.approx([3.0] * 7)
    assert smooth([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)


def test_the_suggestion_is_where_the_loss_falls_most() -> None:
    """Of a sigmoid over the rate's logarithm: its middle, a little late by the smoothing."""
    rates = [CONFIG.rate(step) for step in range(30)]
    losses = [5 - 4 / (1 + math.exp(-2 * (math.log10(rate) + 1))) for rate in rates]
    found = suggest(rates, losses)
    assert 0.1 <= found.suggestion <= 0.1 * 10 ** (6 / 29 * 6)
    assert found.facts() == {
        "suggestion": found.suggestion, "rates": rates, "losses": losses, "smoothed": smooth(losses)
    }  # fmt: skip


def test_a_recovery_from_a_lost_loss_is_not_what_is_looked_for() -> None:
    """Though it is steeper than all before."""
    rates = [CONFIG.rate(step) for step in range(30)]
    losses = [3.0] * 8 + [2.5, 2.0, 1.5, 1.0, 1.0, 1.0] + [50.0, 40.0] + [2.0] * 14
    assert rates[8] <= suggest(rates, losses).suggestion <= rates[13]


@pytest.mark.parametrize("losses", [[float(i) for i in range(30)], [1.0] * 30, [3.0, 1.0]])
def test_a_loss_that_never_falls_suggests_nothing(losses: list[float]) -> None:
    """The error says what to set."""
    rates = [CONFIG.rate(step) for step in range(len(losses))]
    with pytest.raises(ValueError, match=r"no learning rate from 0.0001 to .* set optim.lr"):
        suggest(rates, losses)


def fit(
    lr: float | str, *, accumulate: int = 1, train: bool = True, finder: bool = True
) -> tuple[Classifier, list[Found], lightning.Trainer]:
    """Train two steps on batches with a colour for each class, with a finder before."""
    lightning.seed_everything(0, verbose=False)

    def coloured(seed: int) -> Batch:
        one = batch(16, seed)
        return one._replace(images=(one.images // 4 + one.labels[:, None, None, None] * 40).byte())

    def endless() -> Iterator[Any]:
        return (coloured(seed) for seed in itertools.count())

    optim = OptimConfig(lr=lr)
    module = Classifier(
        Probe(), classes=4, optim=optim, loss=LossConfig(), mix=MixConfig(mixup_alpha=0.2),
        lr_of=lambda step: optim.effective_lr(256) / (1 + step),
    )  # fmt: skip
    found: list[Found] = []
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    if finder:
        callback = LRFinder(CONFIG, batches=endless, report=found.append, seed=0, train=train)
        trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    batches = Loader([coloured(seed) for seed in range(2 * accumulate)])
    trainer.fit(module, batches, Loader([batch(4)]))
    return module, found, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_what_it_would_be_with_the_rate_in_its_recipe(accumulate: int) -> None:
    """Bit for bit: weights and generators; the rate that was found is used."""
    auto, (found,), _ = fit("auto", accumulate=accumulate)
    state = torch.get_rng_state()
    assert auto.lr_scale == found.suggestion
    assert CONFIG.lr_min < found.suggestion < CONFIG.lr_max
    assert min(found.smoothed) < found.smoothed[0] * 0.9
    stated, nothing, _ = fit(found.suggestion, accumulate=accumulate)
    assert nothing == []  # a recipe that states its rate is not asked
    for ours, theirs in zip(auto.parameters(), stated.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)


def test_finding_alone_trains_nothing() -> None:
    """Also where the recipe states a rate; the weights stay as they were."""
    fresh, _, _ = fit(0.0, finder=False)
    module, (found,), trainer = fit(0.3, train=False)
    assert trainer.global_step == 0
    assert found.suggestion > 0
    for ours, theirs in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_ramp_ends_where_the_loss_is_lost() -> None:
    """Far above its least value there is nothing to be seen."""
    _, (found,), _ = fit("auto")
    assert len(found.rates) < CONFIG.steps or found.smoothed[-1] <= 4 * min(found.smoothed)
    assert all(math.isfinite(loss) for loss in found.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 9}, "steps must be at least 10, got 9"),
        ({"lr_min": 0.0}, "in order, got 0.0 and 10.0"),
        ({"lr_min": 1.0, "lr_max": 0.5}, "in order, got 1.0 and 0.5"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match=message):
        FinderConfig(**options)
