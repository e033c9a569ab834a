"""A run of train.py that a fault is done to: its processes, the samples it used, its weights."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RUN_S = 300
"""A run that takes longer hangs."""
WORLD = 2
"""Processes of a run."""


class Chaos(Exception):  # noqa: N818  (what a fault led to)
    """Raised where something is not as it has to be; says what."""


class Training:
    """A run of train.py, of which nothing is left behind. All its processes carry a mark."""

    def __init__(self, command: list[str], folder: Path) -> None:
        """folder: of the run; output goes beside it."""
        self.folder = folder
        self._mark = str(time.monotonic_ns())
        self._output = folder.with_suffix(".log").open("a+")
        self._start = self._output.tell()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | {"CHAOS": self._mark},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> "Training":  # noqa: PYI034  (Python 3.10)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()

    def kill(self) -> None:
        """SIGKILL to all that is left."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def processes(self) -> list[int]:
        """Ids of all that are alive."""
        pids = map(int, filter(str.isdigit, os.listdir("/proc")))
        mark = f"CHAOS={self._mark}".encode()
        return [pid for pid in pids if mark in read(pid, "environ").split(b"\0")]

    def ranks(self) -> dict[int, int]:
        """Process id of each rank."""
        found = {}
        for pid in self.processes():
            program = read(pid, "cmdline").split(b"\0")[1:2]
            if program and program[0].endswith(b"train.py"):
                values = read(pid, "environ").split(b"\0")
                named = dict(value.partition(b"=")[::2] for value in values)
                found[int(named.get(b"RANK", named.get(b"LOCAL_RANK", b"0")))] = pid
        return found

    def workers(self, rank: int) -> list[int]:
        """Loader workers of a rank: what its fork server has forked."""
        below = children(self.ranks()[rank])
        servers = [pid for pid in below if b"forkserver" in read(pid, "cmdline")]
        return [pid for server in servers for pid in children(server)]

    def wait_for_step(self, step: int, behind: int = 0) -> None:
        """Until rank 0 has begun the step, in a line behind so many. Raises Chaos if it ends."""
        while not any(line["step"] >= step for line in trace(self.folder, 0)[behind:]):
            if self.process.poll() is not None:
                raise Chaos(f"ended by itself before step {step}: {self.text()[-2000:]}")
            time.sleep(0.02)

    def wait(self, limit_s: float, but: int | None = None) -> float:
        """Seconds until all processes but that rank, and its workers, have ended."""
        began = time.monotonic()
        others = set(self.ranks().values()) - {but}  # rank 0 may have started them
        while any(not belongs(pid, but, others) for pid in self.processes()):
            if time.monotonic() > began + limit_s:
                raise Chaos(f"still there after {limit_s:.0f} s: {self.text()[-2000:]}")
            time.sleep(0.05)
        return time.monotonic() - began

    def text(self) -> str:
        """What was printed."""
        self._output.flush()
        return Path(self._output.name).read_text()[self._start :]

    def said(self) -> str:
        """The line for the user."""
        lines = [line for line in self.text().splitlines() if line.startswith("train.py: error: ")]
        return " | ".join(line.removeprefix("train.py: error: ") for line in lines)


def environment() -> dict[str, str]:
    """One thread a process, however it is started: the sums have the same order."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def belongs(pid: int, to: int | None, others: set[int]) -> bool:
    """Whether it is that process or one below it, and not below one of the others."""
    while to is not None and pid != to and pid > 1 and pid not in others:
        pid = int((read(pid, "stat").rpartition(b")")[2].split() or [b"", b"0"])[1])
    return pid == to


def read(pid: int, name: str) -> bytes:
    """A file of /proc about a process; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def ended_well(training: Training) -> None:
    """Raise Chaos unless the run comes to its end."""
    training.wait(RUN_S)
    if training.process.wait():
        raise Chaos(f"it did not go on: {training.text()[-2000:]}")


def trace(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The lines that a rank wrote, whole ones only."""
    path = folder / f"samples-rank{rank}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(folder: Path) -> dict[int, list[str]]:
    """Keys of each step; of a step that was done twice, the last time's."""
    steps: dict[int, list[str]] = {}
    for parts in zip(*({one["step"]: one["keys"] for one in trace(folder, r)}.items()
                       for r in range(WORLD)), strict=True):  # fmt: skip
        steps[parts[0][0]] = [key for _, keys in parts for key in keys]
    return steps


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    path = folder / "checkpoints" / "last.ckpt"
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return weights


def differences(folder: Path, whole: Path) -> list[str]:
    """What the continued run has otherwise than the undisturbed one."""
    found = []
    if steps_of(folder) != steps_of(whole):
        found.append("samples")
    ours, theirs = weights_of(folder), weights_of(whole)
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        found.append("weights")
    return found
