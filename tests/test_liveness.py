"""model/liveness.py: what a user sees of a training whose ranks die, stop or fail."""

import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch import distributed

from model.liveness import of_a_collective
from tests.faulty import Fault
from tests.runs import PROGRAM, TWO, arguments, lines, start, still_there

TIMEOUT_S = 6


def train(recipe: Path, run: Path, fault: Fault) -> "subprocess.Popen[str]":
    """Two ranks, one of which meets with something."""
    line = [str(PROGRAM), *arguments(recipe, run, *TWO, f"trainer.timeout_s={TIMEOUT_S}")]
    return start(line, [fault], run)


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (Fault(rank=1, place="train", step=3, do="data"), 3, "error: rank 1: shard 7 is broken"),
        (Fault(rank=0, place="save", step=4, do="disk"), 1, "error: rank 0: [Errno 28] No space"),
        (Fault(rank=1, place="train", step=3, do="SIGKILL"), 1, "rank 1 (process "),
        (Fault(rank=1, place="train", step=3, do="hang"), 1, "rank 1 (process"),
        (Fault(rank=1, place="validation", step=6, do="SIGSTOP"), 1, "has not been heard of for"),
    ],
    ids=str,
)
def test_one_line_names_the_rank_and_all_end(
    small_recipe: Path, tmp_path: Path, fault: Fault, status: int, words: str
) -> None:
    """Whatever happens to one rank: one line, a status, nobody left, in time."""
    run = tmp_path / "run"
    with train(small_recipe, run, fault) as process:
        while lines(run, 0) < 2 * 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            select.select([], [], [], 0.05)
        began = time.monotonic()
        _, errors = process.communicate(timeout=100)
    took = time.monotonic() - began
    assert process.returncode == status, errors
    (line,) = errors.splitlines()
    assert words in line
    assert "rank 1" in line or fault.rank == 0
    assert took < TIMEOUT_S + 10
    for descriptor in still_there(run):
        assert select.select([descriptor], [], [], 10)[0], "a process outlived the first one"
        os.close(descriptor)


def test_the_others_end_without_rank_0(small_recipe: Path, tmp_path: Path) -> None:
    """Stopped, it neither holds the store nor watches over those that it has started."""
    run = tmp_path / "run"
    fault = Fault(rank=0, place="train", step=3, do="SIGSTOP")
    with train(small_recipe, run, fault) as process:
        while lines(run, 1) < 2 * 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            select.select([], [], [], 0.05)
        (child,) = (
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if b"faulty.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        descriptor = os.pidfd_open(child)
        ended = select.select([descriptor], [], [], TIMEOUT_S + 10)[0]
        os.close(descriptor)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=20)
    assert ended
    assert "rank 0 (process " in errors
    assert "Traceback" not in errors


def test_what_is_of_a_collective() -> None:
    """Errors of torch.distributed, and gloo's, which have no class of their own."""
    assert of_a_collective(distributed.DistNetworkError("x"))
    assert of_a_collective(RuntimeError("[third_party/gloo/pair.cc:5] Connection closed by peer"))
    assert not of_a_collective(RuntimeError("shapes differ"))
    assert not of_a_collective(ValueError("gloo"))
