"""Preemption: a signal to any rank ends all, saved at one step, and the run goes on exactly."""

import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from model.preemption import EXIT_PREEMPTED, MARKER, exit_status
from tests.test_resume import TRAIN, steps_of

EPOCHS = 40
EPOCH_STEPS = 6


def arguments(recipe: Path, run: Path, world: int, *more: str) -> list[str]:
    """A run that is long enough to be disturbed."""
    options = ["schedule.name=step", f"trainer.devices={world}", f"trainer.batch_size={8 // world}"]
    return [
        *TRAIN,
        "--config",
        str(recipe),
        "--run",
        str(run),
        f"--epochs={EPOCHS}",
        *options,
        *more,
    ]


def lines(run: Path, rank: int = 0) -> int:
    """Steps that a rank has begun."""
    trace = run / f"samples-rank{rank}.jsonl"
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of all ranks: the one that was started, and the training processes below it."""
    found = [process.pid]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"train.py" in command:
            found.append(child)
    return found


def preempt(
    line: list[str], run: Path, *, victims: tuple[int, ...], name: signal.Signals, times: int = 1
) -> None:
    """Start, send the signal to these ranks once training is under way, and wait for the end."""
    before = lines(run)
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        while lines(run) < before + 4:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        pids = ranks_of(process)
        watched = [os.pidfd_open(pid) for pid in pids]
        for _ in range(times):
            for victim in victims:
                os.kill(pids[victim], name)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, errors
    assert "Traceback" not in errors
    assert (run / MARKER).exists()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 30)[0], "a rank outlived the first one"
        os.close(descriptor)


@pytest.mark.parametrize(
    ("world", "victims", "name", "times", "options"),
    [
        (1, (0,), signal.SIGTERM, 1, ()),
        (1, (0,), signal.SIGUSR1, 3, ("trainer.accumulate=2", "trainer.batch_size=4")),
        (1, (0,), signal.SIGTERM, 2, ("data.num_workers=2",)),
        (2, (0,), signal.SIGTERM, 1, ()),
        (2, (1,), signal.SIGUSR1, 1, ()),
        (2, (0, 1), signal.SIGTERM, 2, ()),
    ],
    ids=str,
)
def test_a_preempted_run_goes_on_exactly(
    small_recipe: Path,
    tmp_path: Path,
    world: int,
    victims: tuple[int, ...],
    name: signal.Signals,
    times: int,
    options: tuple[str, ...],
) -> None:
    """Preempted, and started again: 75, then the samples and weights of an undisturbed run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    preempt(
        arguments(small_recipe, run, world, *options), run, victims=victims, name=name, times=times
    )
    step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < EPOCHS * EPOCH_STEPS
    # Not to the end of 40 epochs: both runs are compared where the resumed one has come to.
    stop = f"--epochs={step // EPOCH_STEPS + 2}"
    for folder, resume in ((run, ("--resume", "auto")), (whole, ())):
        line = [*arguments(small_recipe, folder, world, *options), stop, *resume]
        done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    assert not (run / MARKER).exists()
    if "trainer.accumulate=2" not in options:
        assert steps_of(run, world) == steps_of(whole, world)
    ours, theirs = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for folder in (run, whole)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """75 for whoever a launcher waits for; 0 for ranks that Lightning watches itself."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert (exit_status(0), exit_status(1)) == (EXIT_PREEMPTED, 0)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert exit_status(1) == EXIT_PREEMPTED
