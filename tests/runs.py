"""Runs that are processes of their own, how they are started, and what they leave."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from tests import faulty
from tests.faulty import Fault
from tests.witness import STEPS

ROOT = Path(__file__).parents[1]
TRAIN = [sys.executable, str(ROOT / "train.py")]
PROGRAM = Path(faulty.__file__)
"""train.py, with faults to come."""
TWO = ("--devices=2", "trainer.batch_size=2", "trainer.accumulate=2")
"""Ranks have 3 and 4 batches of the 13 validation images."""


def one_line(stderr: str) -> str:
    """The only line of an error message; no traceback."""
    (line,) = stderr.splitlines()
    return line


def arguments(recipe: Path, run: Path, *more: str) -> list[str]:
    """Of a run of two epochs of 6 steps, with small checkpoints."""
    network = ["model.name=resnet9", "model.width=4", "model.small_stem=false"]
    every = ("trainer.checkpoint_every_n_steps=4", "trainer.log_every_n_steps=1")
    return ["--config", str(recipe), "--run", str(run), *network, *every, *more]


def lines(run: Path, rank: int = 0) -> int:
    """Batches that a rank has begun."""
    trace = run / f"samples-rank{rank}.jsonl"
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


OWN_MEMORY = """
mount -t tmpfs tmpfs /dev/shm && "$@"; status=$?
for _ in $(seq 100); do [ -z "$(ls /dev/shm)" ] && exit $status; sleep 0.1; done
ls /dev/shm >&2; exit 99
"""


def start(
    line: list[str], faults: list[Fault], run: Path, *, own_memory: bool = False
) -> "subprocess.Popen[str]":
    """Python with faults to come. All its processes carry the run's name.

    own_memory: with a /dev/shm that nobody else sees, which must be empty at the end (root).
    """
    values = json.dumps([vars(fault) for fault in faults])
    around = ["unshare", "-m", "bash", "-c", OWN_MEMORY, "bash"] if own_memory else []
    return subprocess.Popen(
        [*around, sys.executable, *line],
        env=os.environ | {"FAULTS": values, "OMP_NUM_THREADS": "1", "RUN": str(run)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def still_there(run: Path) -> list[int]:
    """Descriptors of all processes whose environment names this run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if str(run).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(os.pidfd_open(int(pid)))
    return found


def run(
    program: str, *arguments: str | Path | int, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        [sys.executable, ROOT / program, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def write_csv(run: Path, version: int, rows: list[dict[str, float]]) -> None:
    """Metrics as Lightning writes them: a column each, empty where a row has none."""
    names = sorted({name for row in rows for name in row})
    folder = run / "csv" / f"version_{version}"
    folder.mkdir(parents=True)
    lines = [",".join(str(row.get(name, "")) for name in names) for row in rows]
    (folder / "metrics.csv").write_text("\n".join([",".join(names), *lines]) + "\n")


def steps_of(run: Path, world: int) -> dict[int, list[str]]:
    """Keys of each step in global-batch order; of a step that was done twice, the last time's."""
    steps: dict[int, list[list[str]]] = {}
    for rank in range(world):
        for text in (run / f"samples-rank{rank}.jsonl").read_text().splitlines():
            line = json.loads(text)
            steps.setdefault(line["step"], [[]] * world)[rank] = line["keys"]
    return {step: [key for part in parts for key in part] for step, parts in steps.items()}


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights of the run's last checkpoint."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * STEPS
    weights: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return weights
