#!/usr/bin/env python3
"""Do to a training what machines do to it, and see whether it goes on as if nothing had happened.

It trains the demo's digits with 2 processes (CPU, gloo): undisturbed, and then for each fault anew
until the fault strikes, at a rank and a step that the seed tells, and on with --resume auto. All
processes must end in time, and the continued run must have used the same samples in the same steps
and have the same final weights, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sharding.console import positive
from sharding.errors import UsageError, reports_errors

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  python scripts/chaos.py --all
  python scripts/chaos.py kill stop --seed 7

faults:
"""
EPOCHS = 2
TIMEOUT_S = 10
"""trainer.timeout_s of all runs."""
GRACE_S = 10
"""How much later everyone must have ended at the latest."""
PREEMPTED_S = 30
"""The same after a SIGTERM."""
RUN_S = 300
"""A run that takes longer hangs."""
PORT = 29511
WORLD = 2


class Chaos(Exception):  # noqa: N818  (what a fault led to)
    """Raised where something is not as it has to be; says what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a fault led to."""

    what: str
    seconds: float
    """From the fault to the end of the last process that it left alive; for a broken file, from the
    start to the first step."""
    limit_s: float
    said: str
    """The line that the user sees."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Where a fault takes place."""

    folder: Path
    """Of the run; its parent holds the data and the undisturbed run."""
    draw: random.Random = field(default_factory=random.Random)
    steps: int = 0
    """Of a whole run."""

    def command(self, *options: str) -> list[str]:
        """Of the run, on this machine."""
        return [sys.executable, "train.py", *self.arguments(), *options]

    def arguments(self) -> list[str]:
        """For train.py."""
        return [
            *("--config", "recipes/demo.yaml", "--run", str(self.folder), "--epochs", str(EPOCHS)),
            f"data.root={self.folder.parent / 'shards'}",
            *("model.name=resnet9", "model.width=16", "model.small_stem=false"),
            f"trainer.timeout_s={TIMEOUT_S}",
        ]

    def start(self, *options: str) -> Training:
        """Begin the run, or go on."""
        return Training(self.command(*options), self.folder)

    def step(self) -> int:
        """Where the fault strikes."""
        return self.draw.randrange(6, self.steps - 8)

    def rank(self) -> int:
        """Whom it strikes."""
        return self.draw.randrange(WORLD)

    def go_on(self) -> None:
        """To the end. Raises Chaos."""
        with self.start("--resume", "auto") as training:
            ended_well(training)


def kill(scene: Scene) -> Seen:
    """SIGKILL to a rank, as by the kernel when memory is out."""
    return strike(scene, signal.SIGKILL, "killed")


def stop(scene: Scene) -> Seen:
    """SIGSTOP to a rank: it is there, and does nothing."""
    return strike(scene, signal.SIGSTOP, "stopped")


def strike(scene: Scene, name: signal.Signals, verb: str) -> Seen:
    """A signal to a rank, after which the others must end by themselves, and name it."""
    step, rank = scene.step(), scene.rank()
    with scene.start() as training:
        training.wait_for_step(step)
        victim = training.ranks()[rank]
        os.kill(victim, name)
        seconds = training.wait(RUN_S, but=victim)
        said = training.said()
    if f"rank {rank} " not in said:
        raise Chaos(f"nobody named rank {rank}: {said!r}")
    scene.go_on()
    what = f"rank {rank} {verb} at step {step}"
    return Seen(what=what, seconds=seconds, limit_s=TIMEOUT_S + GRACE_S, said=said)


def preempt(scene: Scene) -> Seen:
    """SIGTERM to a rank, as by a scheduler."""
    step, rank = scene.step(), scene.rank()
    with scene.start() as training:
        training.wait_for_step(step)
        os.kill(training.ranks()[rank], signal.SIGTERM)
        seconds = training.wait(RUN_S)
        status, printed = training.process.wait(), training.text().splitlines()
    if status != 75 or not (scene.folder / "PREEMPTED").exists():
        raise Chaos(f"exit status {status}, and not 75 with a file PREEMPTED")
    scene.go_on()
    said = next(line for line in printed if line.startswith("preempted"))
    what = f"SIGTERM to rank {rank} at step {step}"
    return Seen(what=what, seconds=seconds, limit_s=PREEMPTED_S, said=f"{said} (75)")


def worker(scene: Scene) -> Seen:
    """SIGKILL to a loader worker."""
    step, rank = scene.step(), scene.rank()
    with scene.start() as training:
        training.wait_for_step(step)
        os.kill(scene.draw.choice(training.workers(rank)), signal.SIGKILL)
        seconds = training.wait(RUN_S)
        said = training.said()
    if "worker" not in said:
        raise Chaos(f"nobody spoke of a worker: {said!r}")
    scene.go_on()
    what = f"a worker of rank {rank} killed at step {step}"
    return Seen(what=what, seconds=seconds, limit_s=2 * GRACE_S + TIMEOUT_S, said=said)


def truncate(scene: Scene) -> Seen:
    """The newest checkpoint loses its end, after all ranks were killed."""
    step = scene.step()
    with scene.start() as training:
        training.wait_for_step(step)
        training.kill()
    last = scene.folder / "checkpoints" / "last.ckpt"
    size = scene.draw.randrange(last.stat().st_size)
    os.truncate(last, size)
    lines, began = len(trace(scene.folder, 0)), time.monotonic()
    with scene.start("--resume", "auto") as training:
        training.wait_for_step(0, behind=lines)
        seconds = time.monotonic() - began
        ended_well(training)
        warnings = [line for line in training.text().splitlines() if line.startswith("warning: ")]
    if not any("last.ckpt" in line for line in warnings):
        raise Chaos(f"nobody spoke of last.ckpt: {warnings}")
    what = f"last.ckpt cut to {size:,} bytes after step {step}"
    return Seen(what=what, seconds=seconds, limit_s=RUN_S, said=warnings[0])


def disk(scene: Scene) -> Seen:
    """The disk is full in the middle of writing a checkpoint: a tmpfs with too little room."""
    needs_root("mounts a tmpfs")
    whole = scene.folder.parent / "whole" / "checkpoints" / "last.ckpt"
    room = int(whole.stat().st_size * 2.5)  # the last, the one before, and half a new one
    scene.folder.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(scene.folder)]
    enough = ["mount", "-o", f"remount,size={40 * room}", str(scene.folder)]
    kept = scene.folder.with_name("disk-kept")
    script = " && ".join(
        (
            words(small),
            f"{{ ! {words(scene.command())} ; }}",
            f"{{ stat -c %.Y '{scene.folder}/samples-rank0.jsonl'; date +%s.%N; }} > '{kept}.time'",
            words(enough),
            words(scene.command("--resume", "auto")),
            words(["cp", "-a", str(scene.folder), str(kept)]),
        )
    )
    with Training(["unshare", "-m", "bash", "-c", script], scene.folder) as training:
        training.wait(RUN_S)
        said = training.said()
        if training.process.wait():
            raise Chaos(f"the runs on the small disk: {training.text()[-2000:]}")
    if "No space left" not in said:
        raise Chaos(f"nobody spoke of space: {said!r}")
    scene.folder.rmdir()
    kept.rename(scene.folder)
    lines = trace(scene.folder, 0)
    again = next(at for at in range(1, len(lines)) if lines[at]["step"] <= lines[at - 1]["step"])
    what = f"no room for the checkpoint behind step {lines[again - 1]['step']}"
    last_step, end = map(float, Path(f"{kept}.time").read_text().split())
    return Seen(what=what, seconds=end - last_step, limit_s=TIMEOUT_S + GRACE_S, said=said)


def network(scene: Scene) -> Seen:
    """The link between two nodes goes down: network namespaces, torchrun on each."""
    needs_root("makes network namespaces")
    step = scene.step()
    with two_nodes() as nodes:
        with ExitStack() as stack:
            trainings = start_on(nodes, scene, stack)
            trainings[0].wait_for_step(step)
            nodes[0].cut()
            began = time.monotonic()
            for training in trainings:
                training.wait(RUN_S)
            seconds = time.monotonic() - began
            said = " | ".join(training.said() for training in trainings)
        for rank in range(WORLD):
            if f"rank {rank} " not in said:
                raise Chaos(f"nobody named rank {rank}: {said!r}")
        nodes[0].mend()
        with ExitStack() as stack:
            for training in start_on(nodes, scene, stack, "--resume", "auto"):
                ended_well(training)
    what = f"the link between 2 nodes cut at step {step}"
    return Seen(what=what, seconds=seconds, limit_s=TIMEOUT_S + GRACE_S, said=said)


FAULTS: dict[str, Callable[[Scene], Seen]] = {
    one.__name__: one for one in (kill, stop, preempt, worker, truncate, disk, network)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A network namespace, which is connected to another one."""

    name: str
    interface: str
    address: str

    def run(self, *command: str) -> None:
        """Run a command in it."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True)

    def cut(self) -> None:
        """Take the link down."""
        self.run("ip", "link", "set", self.interface, "down")

    def mend(self) -> None:
        """Take it up again."""
        self.run("ip", "link", "set", self.interface, "up")


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two network namespaces with a link between them."""
    names = [f"chaos{os.getpid()}{letter}" for letter in "ab"]
    nodes = tuple(
        Node(name=name, interface=f"v{name}"[:15], address=f"10.213.77.{at}")
        for at, name in enumerate(names, start=1)
    )
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = nodes
        ip("link", "add", first.interface, "netns", first.name, "type", "veth",
           "peer", "name", second.interface, "netns", second.name)  # fmt: skip
        for node in nodes:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", node.interface)
            node.run("ip", "link", "set", "lo", "up")
            node.mend()
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def start_on(
    nodes: tuple[Node, ...], scene: Scene, stack: ExitStack, *options: str
) -> list[Training]:
    """Start the run with torchrun on each node, one process each. They share the run's folder."""
    trainings = []
    for number, node in enumerate(nodes):
        line = [
            *("ip", "netns", "exec", node.name),
            *("env", f"GLOO_SOCKET_IFNAME={node.interface}"),
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={len(nodes)}", "--nproc_per_node=1", f"--node_rank={number}"),
            *(f"--master_addr={nodes[0].address}", f"--master_port={PORT}"),
            *("--", "train.py", *scene.arguments(), "--nodes", str(len(nodes)), "--devices", "1"),
            *options,
        ]
        folder = scene.folder if number == 0 else scene.folder.with_name(f"{node.name}-log")
        trainings.append(stack.enter_context(Training(line, folder)))
    return trainings


def ip(*arguments: str) -> None:
    """Run ip. Raises UsageError where this machine does not allow it."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def needs_root(why: str) -> None:
    """Raise UsageError where it cannot be done."""
    if os.geteuid():
        raise UsageError(f"it {why}, which takes root")
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        raise UsageError(f"it {why}: {', '.join(missing)} not found")


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


def words(arguments: list[str]) -> str:
    """As bash reads them."""
    return " ".join(f"'{argument}'" for argument in arguments)


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


def prepare(folder: Path) -> int:
    """Make the data, and train undisturbed; returns the steps of a run."""
    say("The digits, packed; and a run that nothing disturbs.")
    digits, shards = str(folder / "digits"), str(folder / "shards")
    for line in (
        ["scripts/make_demo_dataset.py", digits],
        ["shard.py", "pack", digits, shards, "--shard_size", "300KB"],
    ):
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    scene = Scene(folder=folder / "whole")
    with scene.start() as training:
        ended_well(training)
    return len(steps_of(scene.folder))


def cause(name: str, folder: Path, *, seed: int, steps: int) -> tuple[bool, list[str]]:
    """Whether all was as it must be, and a row of the table."""
    draw = random.Random(f"{seed} {name}")  # noqa: S311  (no secret)
    scene = Scene(folder=folder / name, draw=draw, steps=steps)
    try:
        seen = FAULTS[name](scene)
    except UsageError as error:
        say(f"   skipped: {error}")
        return True, [name, f"skipped: {error}", "", ""]
    except Chaos as error:
        say(f"   FAILED: {error}")
        return False, [name, f"FAILED: {str(error).splitlines()[0]}", "", ""]
    wrong = differences(scene.folder, folder / "whole")
    late = seen.seconds > seen.limit_s
    say(f"   {seen.what}: {seen.said}")
    say(f"   {seen.seconds:.1f} s" + (f", which is more than {seen.limit_s} s" if late else ""))
    equal = f"OTHER {' AND '.join(wrong).upper()}" if wrong else "the same samples and weights"
    say(f"   continued: {equal}")
    shutil.rmtree(scene.folder)
    time_taken = f"{seen.seconds:.1f} s" + (" LATE" if late else "")
    return not wrong and not late, [name, seen.what, time_taken, equal]


def say(text: str) -> None:
    """Print."""
    print(text, flush=True)


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Cause faults; exit status 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES + "".join(f"  {n:<10}{f.__doc__}\n" for n, f in FAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="one or more of those below")
    parser.add_argument("--all", action="store_true", help="each of them")
    parser.add_argument("--seed", type=positive, default=1, help="of ranks, steps, sizes (1)")
    options = parser.parse_args(arguments)
    names = list(FAULTS) if options.all else options.faults
    unknown = [name for name in names if name not in FAULTS]
    if unknown or not names:
        what = f"no fault {', '.join(unknown)}" if unknown else "which fault?"
        raise UsageError(f"{what}; there are {', '.join(FAULTS)}, or --all")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        steps = prepare(Path(folder))
        rows = []
        for name in names:
            say(f"\n{name}: {FAULTS[name].__doc__}")
            rows.append(cause(name, Path(folder), seed=options.seed, steps=steps))
    say("\n| fault | what happened | all ended after | continued run |\n|---|---|---|---|")
    for _, row in rows:
        say(f"| {' | '.join(row)} |")
    say(f"\n{time.monotonic() - began:.0f} s, seed {options.seed}, {steps} steps")
    return 0 if all(right for right, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
