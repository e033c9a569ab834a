"""model/saving.py: when the clock is looked at, and which checkpoints there are."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from model.classifier import Classifier
from model.loss import LossConfig
from model.optim import OptimConfig
from model.saving import TimedCheckpoint, checkpoint_callbacks
from tests.probes import Loader, Probe, batch


class Noting(TimedCheckpoint):
    """Notes where it saves."""

    def _save_topk_checkpoint(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        self.saved = [*getattr(self, "saved", []), (trainer.global_step, self.batch)]
        super()._save_topk_checkpoint(trainer, *arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.batch = arguments[4]
        super().on_train_batch_end(*arguments)


def steps_saved(folder: Path, minutes: float, every: int, accumulate: int = 1) -> Any:
    """(steps, batch) of each checkpoint of 12 batches."""
    module = Classifier(
        Probe(), classes=4, optim=OptimConfig(), loss=LossConfig(), lr_of=lambda step: 0.1
    )
    callback = Noting(folder, filename="last", minutes=minutes, every_n_steps=every)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        callbacks=[callback],
    )
    trainer.fit(module, Loader([batch(4, seed) for seed in range(12)]), Loader([]))
    # The last one is what Lightning writes at the end of an epoch.
    return [place for place in getattr(callback, "saved", []) if place[1] < 11]


def test_it_saves_when_it_is_time_and_a_step_is_done(tmp_path: Path) -> None:
    """Without waiting, at each look; never within a step; not at all before the time."""
    assert steps_saved(tmp_path / "a", 0.0, 4) == [(4, 3), (8, 7)]
    assert steps_saved(tmp_path / "b", 0.0, 1, accumulate=3) == [(1, 2), (2, 5), (3, 8)]
    assert steps_saved(tmp_path / "c", 60.0, 1) == []
    assert (tmp_path / "a" / "last.ckpt").exists()


def test_weights_and_average_have_best_checkpoints_of_their_own(tmp_path: Path) -> None:
    """Each by its own metric and name; the clock only where it is asked for."""

    def found(**options: Any) -> list[tuple[str | None, str | None]]:
        values: dict[str, Any] = {
            "title": "net", "every_n_steps": 5, "every_minutes": None, "look_every_n_steps": 1,
            "averaged": False,
        }  # fmt: skip
        callbacks = checkpoint_callbacks(tmp_path, **(values | options))
        return [
            (callback.monitor, callback.filename)
            for callback in callbacks
            if isinstance(callback, ModelCheckpoint)
        ]

    plain = [
        (None, "last"),
        ("val/acc1", "net-epoch={epoch}-val_acc1={val/acc1:.4f}"),
    ]
    assert found() == plain
    average = ("val_ema/acc1", "net-epoch={epoch}-val_ema_acc1={val_ema/acc1:.4f}")
    assert found(averaged=True) == [*plain, average]
    assert found(every_minutes=3.0) == [*plain, (None, "last")]
