"""The Lightning Trainer that a recipe asks for."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from model.callbacks import DataMetrics, EpochSummary, ExactValidation, SampleTrace
from model.checkpoint import LAST, AtomicCheckpointIO, AtomicFile

# What every run would print and no user can act on.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated")
warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated")  # by torch 2.15
warnings.filterwarnings("ignore", message=".*does not have many workers")  # the recipe's choice
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # a resumed run's does

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, on what, and how often things are written."""

    epochs: int = 90
    batch_size: int = 256
    """Per device. The global batch is batch_size x devices x nodes x accumulate."""
    accumulate: int = 1
    """Batches whose gradients make one optimizer step."""
    devices: int = 1
    nodes: int = 1
    accelerator: str = "auto"
    precision: str = "32-true"
    val_check_interval: float = 1.0
    """Validate each time this part of an epoch is over."""
    log_every_n_steps: int = 50
    checkpoint_every_n_steps: int = 500
    """Steps between two writes of last.ckpt inside an epoch."""
    trace_samples: bool = False
    """Write which samples each step used to samples-rank*.jsonl in the run's folder."""
    limit_train_batches: float = 1.0
    """Part of each training epoch that is run."""
    limit_val_batches: float = 1.0
    fast_dev_run: bool = False
    """One training and one validation batch, nothing written."""
    overfit_batches: int = 0
    """Train each epoch on its first batches only, so many."""

    def __post_init__(self) -> None:
        for field in (
            "epochs", "batch_size", "accumulate", "devices", "nodes",
            "log_every_n_steps", "checkpoint_every_n_steps",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}"
            )
        for field in ("val_check_interval", "limit_train_batches", "limit_val_batches"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field} must be in (0, 1], got {getattr(self, field)}")

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.world * self.accumulate


def build_strategy(config: TrainerConfig) -> DDPStrategy | Literal["auto"]:
    """DDP for more than one process.

    Without the broadcast of buffers: see Classifier.on_validation_epoch_start.
    """
    return DDPStrategy(broadcast_buffers=False) if config.world > 1 else "auto"


def build_trainer(
    config: TrainerConfig,
    *,
    atomic_file: AtomicFile,
    run: Path | None,
    title: str = "",
    val_samples: int,
    keys_of: Callable[[Sequence[int]], list[str]] | None = None,
) -> lightning.Trainer:
    """A trainer that writes checkpoints, CSV logs and traces below the folder `run`; None: nothing.

    title: what the best checkpoints' names begin with. val_samples: what an exact validation sees.
    """
    on_terminal = sys.stdout.isatty()
    callbacks: list[lightning.Callback] = [ExactValidation(val_samples), DataMetrics()]
    if not on_terminal:
        callbacks.append(EpochSummary())
    if run is not None:
        checkpoints = run / "checkpoints"
        callbacks += [
            ModelCheckpoint(
                checkpoints,
                filename=LAST.removesuffix(".ckpt"),
                every_n_train_steps=config.checkpoint_every_n_steps,
                enable_version_counter=False,
            ),
            ModelCheckpoint(
                checkpoints,
                filename=f"{title}-epoch={{epoch}}-val_acc1={{val/acc1:.4f}}",
                auto_insert_metric_name=False,
                monitor="val/acc1",
                mode="max",
                save_top_k=3,
                save_last=True,
                enable_version_counter=False,
            ),
        ]
        if config.trace_samples:
            assert keys_of is not None
            callbacks.append(SampleTrace(run, keys_of))
    return lightning.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=build_strategy(config),
        precision=cast("Precision", config.precision),
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.val_check_interval,
        limit_train_batches=config.limit_train_batches,
        limit_val_batches=config.limit_val_batches,
        fast_dev_run=config.fast_dev_run,
        overfit_batches=config.overfit_batches,
        log_every_n_steps=config.log_every_n_steps,
        logger=False if run is None else CSVLogger(run, name="csv"),
        callbacks=callbacks,
        enable_checkpointing=run is not None,
        enable_model_summary=False,
        enable_progress_bar=on_terminal,
        use_distributed_sampler=False,  # the loaders know their rank
        plugins=[AtomicCheckpointIO(atomic_file)],
    )
