"""Preemption: a signal to any rank ends all, saved at one step, and the run goes on exactly."""

import csv
import os
import select
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.preemption import (
    EXIT_PREEMPTED,
    MARKER,
    PreemptedError,
    Preemption,
    exit_status,
)
from tests import faulty
from tests.conftest import write_recipe
from tests.faulty import Fault
from tests.runs import (
    PROGRAM,
    TWO,
    arguments,
    start,
    steps_of,
    still_there,
    weights_of,
)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--")


def curves(run: Path) -> dict[str, dict[str, str]]:
    """What each step and each validation found, over all starts of the run."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(run.glob("csv/version_*/metrics.csv")):
        with path.open() as stream:
            for row in csv.DictReader(stream):
                for name in ("train/loss", "val/loss", "val/acc1", "val/seen"):
                    if row.get(name):
                        found.setdefault(name, {})[row["step"]] = row[name]
    return found


def assert_same(run: Path, whole: Path, *, world: int, accumulate: bool = False) -> None:
    """The run used the same samples, and has the same weights and metrics."""
    if not accumulate:  # where a step has several lines
        assert steps_of(run, world) == steps_of(whole, world)
    ours, theirs = weights_of(run), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert curves(run) == curves(whole)
    assert best(run) == best(whole)


def best(run: Path) -> set[str]:
    """Names of the best checkpoints, which say epoch and accuracy."""
    return {path.name for path in (run / "checkpoints").glob("*-epoch=*.ckpt")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are that several tests compare with."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize(
    ("fault", "options", "saved"),
    [
        (Fault(rank=0, place="train", step=3, do="SIGTERM"), (), 4),
        (Fault(rank=0, place="train", step=3, do="SIGUSR1", times=3), (), 4),
        (Fault(rank=0, place="train", step=3, do="SIGINT"), (), 4),
        (Fault(rank=0, place="train", step=5, do="SIGTERM"), (), 6),  # an epoch's end
        (Fault(rank=0, place="save", step=4, do="SIGTERM", times=2), (), 4),
        (Fault(rank=0, place="validation", step=6, do="SIGTERM"), (), 6),
        (
            Fault(rank=0, place="validation", step=3, do="SIGTERM"),
            ("trainer.val_check_interval=0.5",),
            3,
        ),
        (
            Fault(rank=0, place="train", step=3, do="SIGTERM"),
            ("trainer.accumulate=2", "trainer.batch_size=4"),
            4,
        ),
        (
            Fault(rank=0, place="validation", step=6, do="SIGTERM"),
            ("schedule.name=plateau", "schedule.plateau_patience=0", "schedule.warmup_epochs=0"),
            6,
        ),
        (
            Fault(rank=0, place="train", step=5, do="SIGTERM"),
            ("schedule.name=plateau", "schedule.plateau_patience=0", "schedule.warmup_epochs=0"),
            6,
        ),
        (Fault(rank=0, place="sanity", step=0, do="SIGTERM"), (), None),
    ],
    ids=str,
)
def test_a_preempted_run_goes_on_exactly(
    small_recipe: Path,
    undisturbed: Path,
    tmp_path: Path,
    fault: Fault,
    options: tuple[str, ...],
    saved: int | None,
) -> None:
    """In training, in a validation, in a save, before the first step: 75, then as undisturbed."""
    run, whole = tmp_path / "run", undisturbed / "-".join(["run", *options])
    if not whole.exists():
        assert faulty.main([], arguments(small_recipe, whole, *options)) == 0
    assert faulty.main([fault], arguments(small_recipe, run, *options)) == EXIT_PREEMPTED
    assert (run / MARKER).read_text() == f"step {saved or 0}\n"
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert checkpoint.exists() == (saved is not None)
    if saved is not None:
        assert torch.load(checkpoint, weights_only=True)["global_step"] == saved
    assert faulty.main([], arguments(small_recipe, run, *options, "--resume", "auto")) == 0
    assert not (run / MARKER).exists()
    assert_same(run, whole, world=1, accumulate="trainer.accumulate=2" in options)


def test_preempted_while_it_makes_up_for_a_validation(small_recipe: Path, tmp_path: Path) -> None:
    """Before the first step of a resumed run the checkpoint stays what it was."""
    run = tmp_path / "run"
    fault = Fault(rank=0, place="validation", step=6, do="SIGTERM")
    assert faulty.main([fault], arguments(small_recipe, run)) == EXIT_PREEMPTED
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    again = arguments(small_recipe, run, "--resume", "auto")
    assert faulty.main([fault], again) == EXIT_PREEMPTED
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert "val/loss" not in curves(run)
    assert faulty.main([], again) == 0
    assert min(curves(run)["val/loss"], key=int) == "5"  # behind step 6, at last


@pytest.fixture(scope="module")
def whole_of_two(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and the folder of a run of it with two ranks that nothing disturbed."""
    root = tmp_path_factory.mktemp("two")
    recipe, run = write_recipe(root / "small.yaml", small_shards), root / "whole"
    with start([str(PROGRAM), *arguments(recipe, run, *TWO)], [], run) as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return recipe, run


@pytest.mark.parametrize(
    ("launcher", "faults", "status"),
    [
        ((), [Fault(rank=1, place="validation", step=6, do="SIGTERM")], EXIT_PREEMPTED),
        (
            (),
            [Fault(rank=rank, place="save", step=4, do="SIGTERM", times=2) for rank in (0, 1)],
            EXIT_PREEMPTED,
        ),
        (TORCHRUN, [Fault(rank=0, place="train", step=3, do="agent SIGTERM")], None),
    ],
    ids=("one rank in a validation", "both twice in a save", "torchrun"),
)
def test_all_ranks_end_and_go_on_exactly(
    whole_of_two: tuple[Path, Path],
    tmp_path: Path,
    launcher: tuple[str, ...],
    faults: list[Fault],
    status: int | None,
) -> None:
    """All processes gone in time, 75 or the marker, no shared memory left, the rest as undisturbed.

    With torchrun only the marker tells a preemption from an error.
    """
    recipe, whole = whole_of_two
    run = tmp_path / "run"
    line = [*launcher, str(PROGRAM), *arguments(recipe, run, *TWO, "data.num_workers=1")]
    with start(line, faults, run, own_memory=os.geteuid() == 0) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == status or (status is None and process.returncode)
    assert (run / MARKER).exists(), errors
    assert status is None or "Traceback" not in errors
    for descriptor in still_there(run):
        assert select.select([descriptor], [], [], 30)[0], "a process outlived the first one"
        os.close(descriptor)
    with start([*line, "--resume", "auto"], [], run) as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_same(run, whole, world=2, accumulate=True)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first one is told what it does; behind the end none does anything."""
    preemption = Preemption(tmp_path, timeout_s=1)
    preemption._speaks = True
    preemption._ask(signal.SIGINT, None)
    assert capfd.readouterr().err == (
        "\nsaving behind this step, then ending; Ctrl-C again ends at once\n"
    )
    with pytest.raises(KeyboardInterrupt):
        preemption._ask(signal.SIGINT, None)
    stopped: Any = SimpleNamespace(local_rank=0, global_step=3)
    with pytest.raises(PreemptedError):
        preemption._end(stopped, save=False)
    preemption._ask(signal.SIGINT, None)
    assert capfd.readouterr().err == ""


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """75 for whoever a launcher waits for; 0 for ranks that Lightning watches itself."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert (exit_status(0), exit_status(1)) == (EXIT_PREEMPTED, 0)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert exit_status(1) == EXIT_PREEMPTED
