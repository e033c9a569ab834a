"""model/elastic.py: real runs that are killed, and go on with other processes and workers."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch

import train as train_program
from tests.test_elastic import assert_close, at_step
from tests.train_plain import plain_network

ROOT = Path(__file__).parents[1]
BATCH = 12  # divisible by 1, 2, 3 and 4 processes
EPOCH_STEPS = 4  # 51 samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a part of a run is cut; of one that is killed, behind how many batches of rank 0."""

    world: int
    batch_size: int
    workers: int
    kill_at: int = 0

    @property
    def batches(self) -> int:
        """Batches of a process that make a step."""
        return BATCH // self.world // self.batch_size

    def arguments(self, recipe: Path, run: Path, epochs: int) -> list[str]:
        """The command line: the same one but for processes, workers, and what fits on a device."""
        return [
            "--config", str(recipe), "--run", str(run), "--epochs", str(epochs), "--resume", "auto",
            "--global_batch_size", str(BATCH), "--devices", str(self.world),
            "--batch_size", str(self.batch_size), "--num_workers", str(self.workers),
            "schedule.name=constant",
        ]  # fmt: skip


def train_and_kill(line: list[str], run: Path, *, at_line: int) -> bytes:
    """Start a run; kill all its processes when rank 0 has begun so many batches; rank 0's trace.

    Rank 0 writes into a pipe, so that the batch is waited for, not looked for.
    """
    run.mkdir(exist_ok=True)
    trace, written = run / "samples-rank0.jsonl", b""
    os.mkfifo(trace)
    pipe = os.open(trace, os.O_RDWR | os.O_NONBLOCK)
    with (
        (run / "stderr").open("w+") as errors,
        subprocess.Popen(line, cwd=ROOT, stderr=errors, start_new_session=True) as process,
    ):
        watched = os.pidfd_open(process.pid)
        try:
            while written.count(b"\n") < at_line:
                ready, _, _ = select.select([pipe, watched], [], [], 200)
                assert ready == [pipe], (run / "stderr").read_text()
                written += os.read(pipe, 1 << 16)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    while select.select([pipe], [], [], 0)[0]:
        written += os.read(pipe, 1 << 16)
    os.close(watched)
    os.close(pipe)
    return written


def assert_samples(traces: list[bytes], part: Cut, expected: list[list[str]], start: int) -> int:
    """Each rank has its part of each step, in order, from `start` on; returns the steps begun.

    Each line names Lightning's number of the batch within the epoch, which is looked at too.
    """
    steps = 0
    each = BATCH // part.world
    for rank, trace in enumerate(traces):
        lines = [json.loads(text) for text in trace.splitlines(keepends=True) if text[-1:] == b"\n"]
        for number, line in enumerate(lines):
            step, piece = divmod(number, part.batches)
            step += start
            first = rank * each + piece * part.batch_size
            epoch, step_of_epoch = divmod(step, EPOCH_STEPS)
            assert line == {
                "epoch": epoch,
                "step": step,
                "batch": step_of_epoch * part.batches + piece,
                "keys": expected[step][first : first + part.batch_size],
            }, (rank, part)
        steps = max(steps, -(-len(lines) // part.batches))
    return steps


def undisturbed(recipe: Path, run: Path, epochs: int) -> list[list[str]]:
    """Samples of each step of a run in this process that nothing happens to."""
    alone = Cut(world=1, batch_size=BATCH, workers=0)
    assert train_program.main(alone.arguments(recipe, run, epochs)) == 0
    lines = (run / "samples-rank0.jsonl").read_text().splitlines()
    assert len(lines) == epochs * EPOCH_STEPS
    return [json.loads(line)["keys"] for line in lines]


def train_in_parts(
    recipe: Path, run: Path, parts: list[Cut], expected: list[list[str]]
) -> Iterator[str]:
    """Do the parts of a run one behind the other, each but the last one killed; a line for each."""
    for part in parts:
        start, killed = at_step(run), bool(part.kill_at)
        arguments = part.arguments(recipe, run, len(expected) // EPOCH_STEPS)
        line = [sys.executable, "-m", "tests.train_plain", *arguments]
        files = [run / f"samples-rank{rank}.jsonl" for rank in range(part.world)]
        if killed:
            traces = [train_and_kill(line, run, at_line=part.kill_at)]
        else:
            if part.world == 1:
                assert train_program.main(arguments) == 0
            else:
                subprocess.run(line, cwd=ROOT, check=True, timeout=200)
            traces = [files[0].read_bytes()]
        traces += [path.read_bytes() if path.exists() else b"" for path in files[1:]]
        begun = assert_samples(traces, part, expected, start)
        assert killed or start + begun == len(expected)
        for path in files:
            path.unlink(missing_ok=True)
        yield f"{part}: steps {start} to {start + begun - 1}, killed: {killed}"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights in the end, and the momenta."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"]
    momenta = {f"momentum {key}": value["momentum_buffer"] for key, value in state.items()}
    return {**checkpoint["state_dict"], **momenta}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process train the same network as tests/train_plain.py."""
    monkeypatch.setattr("recipes.build.build_network", plain_network)


@pytest.mark.usefixtures("plain")
def test_killed_and_cut_anew(small_recipe: Path, tmp_path: Path) -> None:
    """Two processes, then three, then one; batches and workers change, too."""
    expected = undisturbed(small_recipe, tmp_path / "whole", 6)
    parts = [
        Cut(world=2, batch_size=3, workers=1, kill_at=2 * 4 + 1),
        Cut(world=3, batch_size=4, workers=0, kill_at=5),
        Cut(world=1, batch_size=2, workers=2),
    ]
    done = list(train_in_parts(small_recipe, tmp_path / "run", parts, expected))
    print(*done, sep="\n")
    assert_close(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


# Every world follows every world, itself too, and has every number of workers once.
WALK = (1, 1, 2, 1, 3, 1, 4, 2, 2, 3, 2, 4, 3, 3, 4, 4, 1, 2, 3, 4)


def walk(seed: int) -> list[Cut]:
    """The parts of a run that is killed at random batches of random sizes, and ends alone."""
    random = Random(seed)
    workers = {world: random.sample(range(5), 5) for world in range(1, 5)}
    parts = []
    for world in WALK:
        sizes = [size for size in range(1, BATCH + 1) if BATCH // world % size == 0]
        size = random.choice(sizes)
        kill_at = random.randint(1, 8 * (BATCH // world // size))
        parts.append(
            Cut(world=world, batch_size=size, workers=workers[world].pop(), kill_at=kill_at)
        )
    assert not any(workers.values())
    assert len({*pairwise(WALK)}) == 16
    return [*parts, Cut(world=1, batch_size=3, workers=2)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("seed", [1])
def test_all_worlds_and_workers(small_recipe: Path, tmp_path: Path, seed: int) -> None:
    """Killed twenty times: worlds 1 to 4 behind each other, each with 0 to 4 workers."""
    expected = undisturbed(small_recipe, tmp_path / "whole", 40)
    for line in train_in_parts(small_recipe, tmp_path / "run", walk(seed), expected):
        print(line)
    most = assert_close(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))
    print(f"weights differ by at most {most:.2g}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("world", "size"), [(1, 3), (2, 3), (3, 2), (4, 3)])
def test_equal_cuts_end_with_equal_bits(
    small_recipe: Path, tmp_path: Path, world: int, size: int
) -> None:
    """Killed twice at random batches: weights and momenta of a run that was not, to the bit."""
    random = Random(world * 100 + size)
    expected = undisturbed(small_recipe, tmp_path / "alone", 6)
    whole = Cut(world=world, batch_size=size, workers=0)
    kills = [random.randint(1, 8 * whole.batches) for _ in range(2)]
    parts = [
        *(
            Cut(world=world, batch_size=size, workers=random.randint(0, 4), kill_at=kill)
            for kill in kills
        ),
        Cut(world=world, batch_size=size, workers=random.randint(0, 4)),
    ]
    for folder, what in (("whole", [whole]), ("run", parts)):
        for line in train_in_parts(small_recipe, tmp_path / folder, what, expected):
            print(line)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_close(ours, weights_of(tmp_path / "alone"))
