"""Where metrics go: CSV always, TensorBoard and W&B where asked; and metrics of the device."""

import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from model.classifier import ImageBatch
from model.first_line import first_line

# W&B's own limits are 90 s, and none at all.
_WANDB_INIT_S = 60.0
_WANDB_FINISH_S = 300.0


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Loggers beside the CSV file, which is always written."""

    tensorboard: bool = False
    """Event files in the run's folder tensorboard/ (extra `tensorboard`)."""
    wandb: bool = False
    """Weights & Biases (extra `wandb`); WANDB_MODE=offline needs no network."""
    wandb_project: str = "imagenet-resnet50"
    wandb_name: str | None = None
    """The run's name there; null: the recipe's."""


class TolerantLogger(Logger):
    """A logger whose failure is one line on stderr, and silence from then on."""

    def __init__(self, title: str, make: Callable[[], Logger]) -> None:
        """title: what the line calls it. make: the logger itself; may fail, too."""
        super().__init__()
        self._title = title
        self._inner: Logger | None = None
        with self._tolerant():
            self._inner = make()

    @property
    def name(self) -> str | None:
        """The inner logger's."""
        return self._inner.name if self._inner else None

    @property
    def version(self) -> int | str | None:
        """The inner logger's."""
        return self._inner.version if self._inner else None

    @property
    def experiment(self) -> Any:
        """The inner logger's; Lightning asks for it before training, which opens the run."""
        with self._tolerant():
            return getattr(self._inner, "experiment", None)
        return None  # where it failed

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Metrics of a step."""
        with self._tolerant():
            if self._inner:
                self._inner.log_metrics(metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings of the run."""
        with self._tolerant():
            if self._inner:
                self._inner.log_hyperparams(params, *args, **kwargs)

    def save(self) -> None:
        """Write what is buffered."""
        with self._tolerant():
            if self._inner:
                self._inner.save()

    def finalize(self, status: str) -> None:
        """The run is over."""
        with self._tolerant():
            if self._inner:
                self._inner.finalize(status)

    @contextlib.contextmanager
    def _tolerant(self) -> Any:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever it is, training is worth more)
            self._inner = None
            _warn(f"{self._title} failed, training goes on without it: {first_line(error)}")


@rank_zero_only
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class CSVFile(CSVLogger):
    """Lightning's, without a folder for a run that logs nothing: refused, or at its end before."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The run is over."""
        super().finalize(status)
        with contextlib.suppress(OSError):  # it holds the log
            Path(self.log_dir).rmdir()
            self._experiment = None  # who logs after all makes it anew
            Path(self.root_dir).rmdir()


def build_loggers(
    config: LoggingConfig, run: Path | None, *, name: str, facts: Mapping[str, Any] | None = None
) -> list[Logger]:
    """Loggers that write below the folder `run`; none without one.

    name: the run's, for W&B. facts: the settings that W&B shows with the run.
    """
    if run is None:
        return []
    # Each row at once: who is killed has no time to write what he kept back.
    loggers: list[Logger] = [CSVFile(run, name="csv", flush_logs_every_n_steps=1)]
    if config.tensorboard:
        make: Callable[[], Logger] = lambda: TensorBoardLogger(run, "tensorboard", version="")  # noqa: E731
        loggers.append(TolerantLogger("TensorBoard", make))
    if config.wandb:
        loggers.append(TolerantLogger("W&B", lambda: _wandb(config, run, name, facts or {})))
    return loggers


def _wandb(config: LoggingConfig, run: Path, name: str, facts: Mapping[str, Any]) -> Logger:
    import wandb  # noqa: PLC0415  (optional, and slow to import)

    settings = wandb.Settings(
        init_timeout=_WANDB_INIT_S,
        finish_timeout=_WANDB_FINISH_S,
        login_timeout=_WANDB_INIT_S,  # else a terminal without a key would wait at a question
    )
    return WandbLogger(
        name=config.wandb_name or name,
        project=config.wandb_project,
        save_dir=run,
        id=_wandb_id(run) if rank_zero_only.rank == 0 else None,  # type: ignore[attr-defined]
        config=dict(facts),
        settings=settings,
    )


def _wandb_id(run: Path) -> str:
    """The id under which W&B knows this folder's run, so that a resumed run goes on there."""
    path = run / "wandb_id"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


class DeviceMetrics(lightning.Callback):
    """Logs rank 0's speed and, on a GPU, memory and utilization, each log_every_n_steps steps.

        device/images_per_s   of this device, from one log to the next, without validations
        device/memory_gb      most that tensors held so far, in 10^9 bytes
        device/utilization    percent of the last second in which a kernel ran (extra `gpu`)

    Nothing here waits for the device.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = 0.0
        self._images = 0
        self._logged_step = -1
        self._has_utilization = True

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count."""
        self._since, self._images = self._clock(), 0

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count anew: validation is no training."""
        self._since, self._images = self._clock(), 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
    ) -> None:
        """Log where Lightning writes the step's metrics."""
        self._images += len(batch.labels)
        step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every or step == self._logged_step:
            return
        self._logged_step = step
        now = self._clock()
        metrics = {"device/images_per_s": self._images / max(now - self._since, 1e-9)}
        self._since, self._images = now, 0
        if pl_module.device.type == "cuda":
            metrics |= self._of_gpu(pl_module.device)
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def _of_gpu(self, device: torch.device) -> dict[str, float]:
        metrics = {"device/memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
        if self._has_utilization:
            try:
                metrics["device/utilization"] = float(torch.cuda.utilization(device))
            except Exception:  # noqa: BLE001  (no pynvml, no permission, a part of a GPU: errors differ)
                self._has_utilization = False
        return metrics
