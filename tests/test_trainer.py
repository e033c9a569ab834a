"""model/trainer.py: the trainer that a recipe asks for."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy

from model.averaging import MovingAverage
from model.callbacks import ProgressLines
from model.checkpoint import AtomicCheckpointIO
from model.guards import DivergenceGuard
from model.saving import TimedCheckpoint
from model.trainer import PROFILERS, TrainerConfig, build_trainer
from sharding.store import atomic_file


def test_the_global_batch_counts_devices_nodes_and_accumulation() -> None:
    """batch_size x devices x nodes x accumulate."""
    config = TrainerConfig(batch_size=32, devices=4, nodes=2, accumulate=3)
    assert (config.world, config.global_batch) == (8, 768)


def test_a_stated_global_batch_stays_when_the_processes_change() -> None:
    """The accumulation follows from it; stated as well, it has to fit."""
    for devices, nodes, batches in [(1, 1, 8), (4, 1, 2), (4, 2, 1)]:
        config = TrainerConfig(
            batch_size=32, global_batch_size=256, devices=devices, nodes=nodes, accelerator="cpu"
        )
        assert (config.batches_per_step, config.global_batch) == (batches, 256)
    assert TrainerConfig(batch_size=64, global_batch_size=256, accumulate=4).batches_per_step == 4
    assert TrainerConfig().batches_per_step == 1
    trainer = build_trainer(
        TrainerConfig(accelerator="cpu", batch_size=32, global_batch_size=256),
        atomic_file=atomic_file, run=None, val_samples=1,
    )  # fmt: skip
    assert trainer.accumulate_grad_batches == 8


def test_parts_of_an_epoch_are_whole_steps() -> None:
    """Of 9 steps half are 4, of which half are 2, whatever a step is made of."""
    for batches in (1, 2, 3, 8):
        config = TrainerConfig(
            accelerator="cpu", limit_train_batches=0.5, val_check_interval=0.5, accumulate=batches
        )
        trainer = build_trainer(
            config, atomic_file=atomic_file, run=None, val_samples=1, epoch_steps=9
        )
        assert int(9 * batches * trainer.limit_train_batches) == 4 * batches
        assert int(4 * batches * trainer.val_check_interval) == 2 * batches
    whole = TrainerConfig(accelerator="cpu", accumulate=3)
    trainer = build_trainer(whole, atomic_file=atomic_file, run=None, val_samples=1, epoch_steps=9)
    assert trainer.limit_train_batches == trainer.val_check_interval == 1.0


def test_several_processes_do_not_broadcast_buffers_in_forward() -> None:
    """Ranks with different numbers of validation batches would wait for each other for ever."""
    config = TrainerConfig(accelerator="cpu", devices=2)
    strategy = build_trainer(config, atomic_file=atomic_file, run=None, val_samples=1).strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["broadcast_buffers"] is False
    assert isinstance(strategy.checkpoint_io, AtomicCheckpointIO)


def test_without_a_folder_nothing_is_written() -> None:
    """No logger, no checkpoints: for evaluation and fast_dev_run."""
    trainer = build_trainer(
        TrainerConfig(accelerator="cpu"), atomic_file=atomic_file, run=None, val_samples=1
    )
    assert trainer.loggers == []
    assert not [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]


def kinds(run: Path | None = None, **options: Any) -> list[type]:
    """The callbacks of a trainer."""
    trainer = build_trainer(
        TrainerConfig(accelerator="cpu", **options),
        atomic_file=atomic_file,
        run=run,
        val_samples=1,
    )
    return [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]


def test_what_the_recipe_switches_on_is_there(tmp_path: Path) -> None:
    """A moving average, checkpoints by the clock; the guard against a lost run always."""
    assert DivergenceGuard in kinds()
    assert MovingAverage not in kinds()
    assert MovingAverage in kinds(ema_decay=0.9)
    assert TimedCheckpoint not in kinds(tmp_path)
    assert TimedCheckpoint in kinds(tmp_path, checkpoint_every_minutes=5.0)


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich's where it is installed; the line for each validation is there in any case."""
    bar = RichProgressBar if find_spec("rich") else TQDMProgressBar
    assert ProgressLines in kinds()
    assert bar not in kinds()
    monkeypatch.setattr("model.trainer.sys.stdout.isatty", lambda: True, raising=False)
    assert ProgressLines in kinds()
    assert bar in kinds()


@pytest.mark.parametrize("name", PROFILERS)
def test_profilers_write_into_the_runs_folder(name: str, tmp_path: Path) -> None:
    """By the names of the recipe."""
    config = TrainerConfig(accelerator="cpu", profiler=name)
    trainer = build_trainer(config, atomic_file=atomic_file, run=tmp_path, val_samples=1)
    assert type(trainer.profiler) is PROFILERS[name]  # type: ignore[attr-defined]
    assert trainer.profiler.dirpath == tmp_path  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, got 0"),
        (
            {"global_batch_size": 256, "devices": 3},
            r"256 cannot be made by 3 processes \(devices x nodes\), alike; 2 or 4 could",
        ),
        (
            {"global_batch_size": 256, "batch_size": 48, "devices": 2, "nodes": 2},
            r"256 cannot be made of batch_size 48 x 4 .* with a batch_size of 32 or 64 it could",
        ),
        (
            {"global_batch_size": 256, "batch_size": 32, "devices": 4, "accumulate": 3},
            r"256 is not batch_size 32 x 4 .* accumulate 3; leave .* \(accumulate=null\): 2",
        ),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"val_check_interval": 0}, "val_check_interval is a share, in"),
        ({"limit_train_batches": 1.5}, "limit_train_batches is a share, in"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_every_n_steps": 0}, "ema_every_n_steps must be at least 1, got 0"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be more than 0 or null, got 0.0"),
        ({"checkpoint_every_minutes": -1.0}, "minutes must be more than 0 or null, got -1.0"),
        ({"profiler": "fast"}, "must be one of simple, advanced, pytorch or null, got 'fast'"),
        ({"precision": "8"}, "precision must be one of 32-true, 16-mixed, bf16-mixed, got '8'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**options)
