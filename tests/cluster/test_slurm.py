"""train.sbatch under SLURM itself: preempted in two ways, it ends as a run that nothing disturbed.

Needs the SLURM of scripts/slurm_up.sh, two nodes on this machine; `make test-cluster` starts it.
"""

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.preemption import MARKER
from tests.runs import lines, steps_of

ROOT = Path(__file__).parents[2]
EPOCHS = 25
EPOCH_STEPS = 6
STEPS = EPOCHS * EPOCH_STEPS

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        "SHARDSTREAM_SLURM" not in os.environ,
        reason="no SLURM: `make test-cluster`, as root on Debian or Ubuntu, starts one",
    ),
]


def slurm(*command: str | int) -> str:
    """What one of SLURM's programs prints."""
    line = [str(word) for word in command]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout.strip()


class Job:
    """A job of train.sbatch with one process on each of two nodes, in the order it goes through."""

    def __init__(self, recipe: Path, run: Path, *more: str) -> None:
        self.run = run
        self.log = run.with_suffix(".out")
        options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        train = [f"--config={recipe}", f"--run={run}", "--batch_size=4", f"--epochs={EPOCHS}"]
        train.append("--num_workers=1")  # signals reach a task's helpers, too
        line = ["sbatch", "--parsable", *options, f"--output={self.log}", "scripts/train.sbatch"]
        done = subprocess.run(
            [*line, *train, "schedule.name=step", *more],
            cwd=ROOT,
            # Names of nodes that are all this machine have no addresses.
            env=os.environ | {"PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=True,
        )
        self.number = done.stdout.strip()

    def facts(self) -> dict[str, str]:
        """What SLURM knows of it."""
        text = slurm("scontrol", "show", "job", "--oneliner", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def until(self, true: Callable[[], bool]) -> None:
        """Wait, as long as the job is not over, if it is not its end that is waited for."""
        for _ in range(2400):
            if true():
                return
            time.sleep(0.1)
        raise AssertionError(f"{self.facts()}\n{self.log.read_text()}")

    def until_steps(self, count: int) -> None:
        """Wait until the run has begun so many steps, over all of the job's lives."""

        def there() -> bool:
            state = self.facts()["JobState"]
            assert state in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}, (
                self.log.read_text()
            )
            return lines(self.run) >= count

        self.until(there)

    def end(self) -> str:
        """Wait for the end; the state in which it ended."""
        self.until(lambda: self.facts()["JobState"] not in {"PENDING", "RUNNING", "COMPLETING"})
        return self.facts()["JobState"]


@pytest.fixture(autouse=True)
def no_jobs_left() -> Iterator[None]:
    """Whatever a test leaves behind is cancelled."""
    yield
    for number in slurm("squeue", "--noheader", "--format=%A").split():
        slurm("scancel", number)


def last_metrics(run: Path) -> dict[str, str]:
    """Metrics of the last validation, as they were logged."""
    newest = max(run.glob("csv/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open() as stream:
        row = [row for row in csv.DictReader(stream) if row["val/acc1"]][-1]
    return {name: row[name] for name in ("step", "val/loss", "val/acc1", "val/acc5")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights of the run's last checkpoint."""
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    found: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return found


def test_a_job_that_is_preempted_twice_ends_as_one_that_was_not(
    small_recipe: Path, tmp_path: Path
) -> None:
    """Told by the time limit's signal, then requeued from outside; the same samples and metrics."""
    job = Job(small_recipe, tmp_path / "run")
    job.until_steps(4)
    slurm("scancel", "--signal=USR1", "--batch", job.number)  # as SLURM does before the time is up
    job.until(lambda: job.facts()["Restarts"] == "1")
    first = lines(job.run)
    assert (job.run / MARKER).exists()
    job.until_steps(first + 4)  # by itself: queued again, after what AuthInfo's cred_expire says
    slurm("scontrol", "requeue", job.number)  # as SLURM does for a job of higher priority
    assert job.end() == "COMPLETED", job.log.read_text()
    assert job.facts()["Restarts"] == "2"
    assert first < STEPS
    log = job.log.read_text()
    assert len(re.findall("resuming from", log)) == 2
    assert "queued again" in log
    assert "Traceback" not in log

    whole = Job(small_recipe, tmp_path / "whole")
    assert whole.end() == "COMPLETED", whole.log.read_text()
    assert steps_of(job.run, 2) == steps_of(whole.run, 2)
    for rank in range(2):  # nothing was done twice: it was saved where it ended
        assert lines(job.run, rank) == lines(whole.run, rank) == STEPS
    assert last_metrics(job.run) == last_metrics(whole.run)
    ours, theirs = weights(job.run), weights(whole.run)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_job_that_is_cancelled_is_not_queued_again(small_recipe: Path, tmp_path: Path) -> None:
    """It saves, like one that is preempted, but stays away."""
    job = Job(small_recipe, tmp_path / "run", "trainer.epochs=4000")
    job.until_steps(4)
    slurm("scancel", job.number)
    assert job.end() == "CANCELLED"
    assert (job.run / MARKER).exists()
    assert job.facts()["Restarts"] == "0"


def test_a_job_that_fails_is_not_queued_again(small_recipe: Path, tmp_path: Path) -> None:
    """Its status is that of train.py: 3 for bad data, which the log names."""
    job = Job(small_recipe, tmp_path / "run", "data.root=/nowhere")
    assert job.end() == "FAILED"
    assert (job.facts()["ExitCode"], job.facts()["Restarts"]) == ("3:0", "0")
    assert "/nowhere/train has no manifest.json" in job.log.read_text()
