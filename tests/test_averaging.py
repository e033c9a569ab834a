"""model/averaging.py: the average's values, where it stands, and what a checkpoint holds."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

from model.averaging import MovingAverage
from model.classifier import Classifier
from model.loss import LossConfig
from model.optim import OptimConfig
from tests.probes import Loader, batch

STEPS = 7


def network() -> nn.Module:
    """With statistics, and an integer among them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


class History(lightning.Callback):
    """Keeps the network's state after each step, and saves checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self._folder = folder

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        self.states.append({k: v.clone() for k, v in module.network.state_dict().items()})
        trainer.save_checkpoint(self._folder / f"{trainer.global_step}.ckpt")


def fit(folder: Path, every: int) -> tuple[MovingAverage, History, Any]:
    """Train a few steps of one batch each."""
    module = Classifier(
        network(), classes=4, optim=OptimConfig(), loss=LossConfig(), lr_of=lambda step: 0.1
    )
    average, history = MovingAverage(decay=0.9, every_n_steps=every), History(folder)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        callbacks=[average, history],
    )
    batches = Loader([batch(8, seed) for seed in range(STEPS)])
    trainer.fit(module, batches, Loader([batch(8)]))
    return average, history, trainer.callback_metrics


@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_exponential_moving_average(tmp_path: Path, every: int) -> None:
    """Of weights and statistics after each so-manieth step, beginning with the first of them."""
    average, history, metrics = fit(tmp_path, every)
    expected: dict[str, torch.Tensor] = {}
    for step, state in enumerate(history.states, start=1):
        if step % every == 0:
            for name, value in state.items():
                if name in expected and value.is_floating_point():
                    expected[name] = 0.9 * expected[name] + 0.1 * value
                else:
                    expected[name] = value
    found = average.network.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert not average.network.training
    assert metrics["val/loss"] != metrics["val_ema/loss"]


def test_a_checkpoint_holds_both(tmp_path: Path) -> None:
    """state_dict is the average, current_model_state what was trained; the module keeps that."""
    average, history, _ = fit(tmp_path, 2)
    saved = torch.load(tmp_path / f"{STEPS}.ckpt", weights_only=True)
    for name, value in average.network.state_dict().items():
        assert torch.equal(saved["state_dict"][f"network.{name}"], value)
        now = saved["current_model_state"][f"network.{name}"]
        assert torch.equal(now, history.states[-1][name])
    assert saved["callbacks"]["MovingAverage"] == {"latest_update_step": 6}
