"""The Lightning Trainer that a recipe asks for."""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast, get_args

import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)

from model.averaging import MovingAverage
from model.callbacks import DataMetrics, ExactValidation, ProgressLines, SampleTrace
from model.catchup import MissedValidation
from model.checkpoint import AtomicCheckpointIO, AtomicFile
from model.elastic import ElasticResume, batches_per_step, whole_steps
from model.guards import DivergenceGuard
from model.liveness import Liveness, Outcome
from model.loggers import DeviceMetrics
from model.mirror import Mirror, Publishing
from model.preemption import Preemption
from model.saving import checkpoint_callbacks
from model.strategy import DDP

# What every run would print and no user can act on.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated")
warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated")  # by torch 2.15
warnings.filterwarnings("ignore", message=".*does not have many workers")  # the recipe's choice
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # a resumed run's does
# Of the callback that writes last.ckpt, where a resumed run writes it at other intervals.
warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
# Where SLURM is installed and one process is started without it, as on a login node.
warnings.filterwarnings("ignore", message="The `srun` command is available")

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, on what, and how often things are written."""

    epochs: int = 90
    batch_size: int = 256
    """Per device. The global batch is batch_size x devices x nodes x accumulate."""
    accumulate: int | None = None
    """Batches of each device whose gradients make one optimizer step; null: as many as
    global_batch_size needs, or 1."""
    global_batch_size: int | None = None
    """Samples of one optimizer step over all devices, whose number may change; null: what the
    others make."""
    devices: int = 1
    nodes: int = 1
    timeout_s: float = 600.0
    """All ranks end when one was silent, or waited for, so many seconds. More than a checkpoint's
    writing and the longest pause of the storage take."""
    accelerator: str = "auto"
    precision: str = "32-true"
    val_check_interval: float = 1.0
    """Validate each time this part of an epoch is over."""
    log_every_n_steps: int = 50
    gradient_clip_val: float | None = None
    """Scale gradients down to this norm where it is larger."""
    ema_decay: float = 0.0
    """Keep a moving average of the weights: what stays of it at each update; 0: none."""
    ema_every_n_steps: int = 1
    """Optimizer steps between two updates of the average."""
    checkpoint_every_n_steps: int = 500
    """Steps between two writes of last.ckpt inside an epoch."""
    checkpoint_every_minutes: float | None = None
    """The same by the clock, which is looked at every log_every_n_steps steps."""
    checkpoint_url: str | None = None
    """Where each checkpoint is published as well: s3://bucket/prefix, or a folder."""
    deterministic: bool = False
    """The same bits in each repetition and after each resume on the same number of devices, also on
    GPUs, for some of the speed. On CPUs they are so in any case."""
    profiler: str | None = None
    """simple, advanced or pytorch: writes profile-* or a trace into the run's folder."""
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
            "epochs", "batch_size", "accumulate", "global_batch_size", "devices", "nodes",
            "log_every_n_steps", "checkpoint_every_n_steps", "ema_every_n_steps", "timeout_s",
        ):  # fmt: skip
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        _ = self.batches_per_step  # checks that there is such a number
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}"
            )
        if self.profiler not in {None, *PROFILERS}:
            raise ValueError(
                f"profiler must be one of {', '.join(PROFILERS)} or null, got {self.profiler!r}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for field in ("gradient_clip_val", "checkpoint_every_minutes"):
            if getattr(self, field) is not None and getattr(self, field) <= 0:
                raise ValueError(f"{field} must be more than 0 or null, got {getattr(self, field)}")
        for field in ("val_check_interval", "limit_train_batches", "limit_val_batches"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(
                    f"{field} is a share, in (0, 1] (0.1: a tenth), got {getattr(self, field)}"
                )

    @property
    def cuts(self) -> list[str]:
        """What shortens training or validation, as field=value; nothing does in a whole run."""
        names = {"limit_train_batches", "limit_val_batches", "fast_dev_run", "overfit_batches"}
        values = {field: getattr(self, field.name) for field in fields(self) if field.name in names}
        return [f"{f.name}={value}" for f, value in values.items() if value != f.default]

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.world * self.batches_per_step

    @property
    def batches_per_step(self) -> int:
        """Batches of each device whose gradients make one optimizer step."""
        return batches_per_step(
            self.global_batch_size,
            batch_size=self.batch_size,
            world=self.world,
            accumulate=self.accumulate,
        )


def build_strategy(config: TrainerConfig) -> DDP | Literal["auto"]:
    """DDP for more than one process."""
    if config.world == 1:
        return "auto"
    return DDP(world=config.world, timeout_s=config.timeout_s, deterministic=config.deterministic)


def build_trainer(
    config: TrainerConfig,
    *,
    atomic_file: AtomicFile,
    run: Path | None,
    title: str = "",
    val_samples: int,
    epoch_steps: int | None = None,
    loggers: Sequence[Logger] = (),
    keys_of: Callable[[Sequence[int]], list[str]] | None = None,
    more: Sequence[lightning.Callback] = (),
    mirror: Mirror | None = None,
    outcome: Outcome = lambda error: None,
    complain: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> lightning.Trainer:
    """A trainer that writes checkpoints, CSV logs and traces below the folder `run`; None: nothing.

    title: what the best checkpoints' names begin with. val_samples: what an exact validation sees.
    epoch_steps: optimizer steps of an epoch, so that parts of one are of whole steps; None: not
    known, for what does not train. more: callbacks that come before all others. mirror: brings
    checkpoints to checkpoint_url; for rank 0. outcome, complain: see Liveness.
    """
    on_terminal = sys.stdout.isatty()
    limit, interval = _parts_of_an_epoch(config, epoch_steps)
    callbacks: list[lightning.Callback] = [
        *more,
        Liveness(timeout_s=config.timeout_s, complain=complain, outcome=outcome),
        ElasticResume(),
        ExactValidation(val_samples),
        DataMetrics(),
        DeviceMetrics(),
        MissedValidation(),
        DivergenceGuard(
            every_n_steps=config.log_every_n_steps,
            keys_of=keys_of,
            report=None if run is None else run / "diverged.json",
        ),
    ]
    if config.ema_decay:
        callbacks.append(
            MovingAverage(decay=config.ema_decay, every_n_steps=config.ema_every_n_steps)
        )
    callbacks.append(ProgressLines(every_s=math.inf) if on_terminal else ProgressLines())
    if run is not None:
        callbacks += checkpoint_callbacks(
            run / "checkpoints",
            title=title,
            every_n_steps=config.checkpoint_every_n_steps,
            every_minutes=config.checkpoint_every_minutes,
            look_every_n_steps=config.log_every_n_steps,
            averaged=config.ema_decay > 0,
        )
        callbacks.append(Preemption(run, timeout_s=config.timeout_s))
        if config.checkpoint_url is not None:
            callbacks.append(Publishing(mirror))
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
        deterministic=config.deterministic or None,
        accumulate_grad_batches=config.batches_per_step,
        gradient_clip_val=config.gradient_clip_val,
        val_check_interval=interval,
        limit_train_batches=limit,
        limit_val_batches=config.limit_val_batches,
        fast_dev_run=config.fast_dev_run,
        overfit_batches=config.overfit_batches,
        log_every_n_steps=config.log_every_n_steps,
        logger=list(loggers),
        callbacks=callbacks,
        enable_checkpointing=run is not None,
        enable_model_summary=False,
        enable_progress_bar=on_terminal,  # rich's, where rich is installed
        use_distributed_sampler=False,  # the loaders know their rank
        plugins=[AtomicCheckpointIO(atomic_file, mirror)],
        profiler=_profiler(config, run),
    )


def _parts_of_an_epoch(config: TrainerConfig, epoch_steps: int | None) -> tuple[float, float]:
    """limit_train_batches, and val_check_interval within it, in batches of whole steps."""
    limit, interval = config.limit_train_batches, config.val_check_interval
    if epoch_steps is None or config.overfit_batches:  # which counts batches itself
        return limit, interval
    accumulate, steps = config.batches_per_step, max(1, int(limit * epoch_steps))
    return (
        whole_steps(limit, steps=epoch_steps, accumulate=accumulate),
        whole_steps(interval, steps=steps, accumulate=accumulate),
    )


def _profiler(config: TrainerConfig, run: Path | None) -> Profiler | None:
    """The profiler that the recipe names; its report goes into the run's folder, or to stdout."""
    if config.profiler is None:
        return None
    make = PROFILERS[config.profiler]
    return make() if run is None else make(dirpath=run, filename="profile")
