"""model/loggers.py: each logger gets the metrics, none can stop training; speed and memory."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import wandb
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import train as program
from loaders.pipeline import Batch
from model.loggers import DeviceMetrics, LoggingConfig, TolerantLogger, build_loggers

ALL = LoggingConfig(tensorboard=True, wandb=True, wandb_project="proj", wandb_name="mine")


class Learner(BoringModel):
    """Learns from labelled batches, and logs a number for each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("number", float(batch_idx))
        return self.layer(batch.images).sum()

    def train_dataloader(self) -> Any:
        data = TensorDataset(torch.ones(12, 32), torch.zeros(12), torch.arange(12))
        return DataLoader(data, batch_size=3, collate_fn=self.batch)

    @staticmethod
    def batch(samples: list[Any]) -> Batch:
        return Batch(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B finds no key, no settings and, where it is not told otherwise, no server."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("model.loggers._WANDB_INIT_S", 2.0)
    yield
    wandb.teardown()  # it remembers the mode


def train(loggers: list[Logger], *callbacks: lightning.Callback, every: int = 1) -> None:
    """Four steps."""
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=loggers,
        callbacks=list(callbacks),
        log_every_n_steps=every,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Learner())


def rows(run: Path, name: str) -> list[float]:
    """A metric of the run's CSV."""
    with (run / "csv" / "version_0" / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


def test_csv_is_always_written_and_nothing_without_a_folder(tmp_path: Path) -> None:
    """The default is CSV alone, also first among others, for Lightning takes the folder from it."""
    (only,) = build_loggers(LoggingConfig(), tmp_path, name="x")
    assert isinstance(only, CSVLogger)
    assert build_loggers(ALL, None, name="x") == []
    assert isinstance(build_loggers(ALL, tmp_path, name="x")[0], CSVLogger)


def test_a_row_is_in_the_csv_file_at_once(tmp_path: Path) -> None:
    """Whoever is killed in the next moment has lost none that was logged."""
    (logger,) = build_loggers(LoggingConfig(), tmp_path, name="r")
    for step, metrics in enumerate([{"loss": 2.0}, {"loss": 1.0}, {"acc": 0.5}]):
        logger.log_metrics(metrics, step)
        with (tmp_path / "csv/version_0/metrics.csv").open() as stream:
            *_, last = csv.DictReader(stream)
        assert {name: float(last[name]) for name in metrics} == metrics
        assert last["step"] == str(step)


def test_all_loggers_get_every_metric_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CSV, TensorBoard's events and W&B's offline file; a second start goes on with W&B's run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = build_loggers(ALL, tmp_path / "run", name="x", facts={"seed": 77})
    train(loggers)
    assert wandb.run is not None
    assert (wandb.run.name, wandb.run.project) == ("mine", "proj")
    assert dict(wandb.run.config)["seed"] == 77
    assert wandb.run.summary["number"] == 3
    wandb.finish()
    assert rows(tmp_path / "run", "number") == [0, 1, 2, 3]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("number")] == [0, 1, 2, 3]
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert next(folder.glob("*.wandb")).stat().st_size > 0
    again = build_loggers(ALL, tmp_path / "run", name="x")[-1]
    assert folder.name.endswith(f"-{again.version}")
    assert "failed" not in capsys.readouterr().err


@pytest.mark.parametrize("key", [None, "0123456789" * 4])
def test_a_wandb_that_cannot_start_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str | None,
) -> None:
    """Without a key, and without a server: training runs to its end with the others."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    train(build_loggers(ALL, tmp_path / "run", name="x"))
    ours = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert len(ours) == 1
    assert ours[0].startswith("warning: W&B failed, training goes on without it: ")
    assert rows(tmp_path / "run", "number") == [0, 1, 2, 3]
    assert (tmp_path / "run" / "tensorboard").exists()


class Breaking(CSVLogger):
    """Fails at its third metric."""

    calls = 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls == 3:
            raise ConnectionError("the line\nis down")
        super().log_metrics(*args, **kwargs)


def test_a_logger_that_breaks_on_the_way_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, no further call, all steps trained; also a package that is not installed."""
    inner = Breaking(tmp_path / "other")
    broken = TolerantLogger("It", lambda: inner)

    def missing() -> Logger:
        raise ModuleNotFoundError("no module")

    absent = TolerantLogger("That", missing)
    assert absent.name is None
    train([CSVLogger(tmp_path, name="csv"), broken, absent])
    assert capsys.readouterr().err.splitlines() == [
        "warning: That failed, training goes on without it: no module",
        "warning: It failed, training goes on without it: the line",
    ]
    assert inner.calls == 3
    assert rows(tmp_path, "number") == [0, 1, 2, 3]


def test_speed_is_images_between_two_logs(tmp_path: Path) -> None:
    """6 images in 2 steps of a second each, logged every second step; no GPU columns on a CPU."""
    ticks = iter(range(100))
    callback = DeviceMetrics(clock=lambda: float(next(ticks)))
    train([CSVLogger(tmp_path, name="csv")], callback, every=2)
    assert rows(tmp_path, "device/images_per_s") == [6, 6]
    head = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "memory" not in head


@pytest.mark.parametrize("pynvml", [True, False])
def test_a_gpu_adds_memory_and_utilization(monkeypatch: pytest.MonkeyPatch, pynvml: bool) -> None:
    """Peak memory in GB and NVML's percentage; where NVML is missing, memory alone."""

    def utilization(device: torch.device) -> int:
        if not pynvml:
            raise ModuleNotFoundError("pynvml")
        return 93

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    metrics = DeviceMetrics()._of_gpu(torch.device("cuda"))
    expected = {"device/memory_gb": 2.5} | ({"device/utilization": 93.0} if pynvml else {})
    assert metrics == expected


@pytest.mark.parametrize(
    "flags", [["--wandb_project", "mine"], ["--wandb_name", "me", "--no_wandb"]]
)
def test_the_flags_of_train_decide_about_wandb(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """A project or a name switches it on, --no_wandb off whatever else stands there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    line = ["--config", str(small_recipe), "--run", str(run), "--epochs", "1", *flags]
    assert program.main([*line, "logging.tensorboard=true"]) == 0
    assert len(list(run.glob("wandb/offline-run-*"))) == int("--no_wandb" not in flags)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "val/acc1", "lr", "device/images_per_s", "data/wait_fraction"} <= names
    assert len(rows(run, "device/images_per_s")) == len(rows(run, "train/loss")) == 6
