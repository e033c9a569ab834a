"""model/trainer.py: the trainer that a recipe asks for."""

from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from model.checkpoint import AtomicCheckpointIO
from model.trainer import TrainerConfig, build_trainer
from sharding.store import atomic_file


def test_the_global_batch_counts_devices_nodes_and_accumulation() -> None:
    """batch_size x devices x nodes x accumulate."""
    config = TrainerConfig(batch_size=32, devices=4, nodes=2, accumulate=3)
    assert (config.world, config.global_batch) == (8, 768)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"val_check_interval": 0}, "val_check_interval must be in"),
        ({"limit_train_batches": 1.5}, "limit_train_batches must be in"),
        ({"precision": "8"}, "precision must be one of 32-true, 16-mixed, bf16-mixed, got '8'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**options)
