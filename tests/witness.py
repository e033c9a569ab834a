"""Runs in this process, and a witness: the samples of each step, a checkpoint at every place."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning
import torch
from torch import nn

from loaders.datamodule import DataConfig, ImageNetData
from loaders.pipeline import Batch
from model.classifier import Classifier
from model.loss import LossConfig
from model.optim import OptimConfig
from model.plateau import Plateau
from model.schedule import ScheduleConfig, lr_at
from model.trainer import TrainerConfig, build_trainer
from sharding.store import atomic_file
from tests.conftest import CLASSES

STEPS = 6  # of an epoch: 51 samples in global batches of 8


class Witness(lightning.Callback):
    """Notes which samples each step got, and saves a checkpoint at every place where one may be."""

    def __init__(self, checkpoints: Path | None) -> None:
        self.seen: list[tuple[int, int, list[int]]] = []
        self.rates: dict[int, float] = {}
        self.validated: list[tuple[int, float]] = []
        self._checkpoints = checkpoints

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.seen.append((trainer.current_epoch, trainer.global_step, batch.numbers.tolist()))

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.rates[self.seen[-1][1]] = trainer.optimizers[0].param_groups[0]["lr"]
        if trainer.global_step > self.seen[-1][1]:
            self._save(trainer, "step")

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val/loss"])
            self.validated.append((trainer.global_step, loss))
            self._save(trainer, "validation")

    def _save(self, trainer: lightning.Trainer, place: str) -> None:
        if self._checkpoints is not None:
            trainer.save_checkpoint(self._checkpoints / f"{trainer.global_step:02}-{place}.ckpt")


def fit(
    root: Path,
    *,
    workers: int = 0,
    resume: Path | None = None,
    save: Path | None = None,
    data_options: Mapping[str, Any] = MappingProxyType({}),
    schedule: ScheduleConfig = ScheduleConfig(warmup_epochs=1),  # noqa: B008  (frozen)
    model_options: Mapping[str, Any] = MappingProxyType({}),
    middle: tuple[nn.Module, ...] = (),
    norm: bool = True,
    run: Path | None = None,
    more: tuple[lightning.Callback, ...] = (),
    **options: Any,
) -> tuple[Witness, dict[str, torch.Tensor]]:
    """Train two epochs in this process; returns what was seen and the final weights.

    middle: more layers. norm: with batch statistics. run: folder that the run writes itself. Where
    there is a moving average, it is among the weights.
    """
    defaults: dict[str, Any] = {"accelerator": "cpu", "epochs": 2, "batch_size": 8}
    config = TrainerConfig(log_every_n_steps=1, **(defaults | options))
    lightning.seed_everything(0, verbose=False)
    data_config = DataConfig(
        root=str(root),
        num_workers=workers,
        train_size=8,
        val_resize=8,
        val_size=8,
        lanes=4,
        **data_options,
    )
    data = ImageNetData(
        data_config, seed=0, batch_size=config.batch_size, accumulate=config.batches_per_step
    )
    # With batch statistics, momentum and more than one layer: all that a resume could forget.
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(6),
        *middle,
        nn.Flatten(),
        nn.Linear(8 * 36, CLASSES),
    )
    values: dict[str, Any] = {
        "optim": OptimConfig(),
        "loss": LossConfig(),
        "lr_of": partial(lr_at, config=schedule, peak_lr=0.05, epoch_steps=STEPS, epochs=2),
        "plateau": Plateau(schedule) if schedule.name == "plateau" else None,
    }
    module = Classifier(network, classes=CLASSES, **(values | dict(model_options)))
    trainer = build_trainer(
        config, atomic_file=atomic_file, run=run, val_samples=13, epoch_steps=STEPS, more=more
    )
    witness = Witness(save)
    trainer.callbacks.append(witness)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    weights = module.state_dict()
    if module.averaged is not None:
        average = module.averaged().state_dict()
        weights |= {f"averaged.{name}": value for name, value in average.items()}
    return witness, weights
