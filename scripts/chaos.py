#!/usr/bin/env python3
"""Do to a training what machines do to it, and see whether it goes on as if nothing had happened.

It trains the demo's digits with 2 processes (CPU, gloo): undisturbed, and then for each fault anew
until the fault strikes, at a rank and a step that the seed tells, and on with --resume auto. All
processes must end in time, and the continued run must have used the same samples in the same steps
and have the same final weights, bit for bit.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.chaos_run is found

from model.first_line import first_line
from scripts.chaos_nodes import Node, two_nodes
from scripts.chaos_run import (
    ROOT,
    RUN_S,
    WORLD,
    Chaos,
    Training,
    differences,
    ended_well,
    steps_of,
    trace,
)
from sharding.console import positive
from sharding.errors import UsageError, reports_errors

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
PORT = 29511


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


def needs_root(why: str) -> None:
    """Raise UsageError where it cannot be done."""
    if os.geteuid():
        raise UsageError(f"it {why}, which takes root")
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        raise UsageError(f"it {why}: {', '.join(missing)} not found")


def words(arguments: list[str]) -> str:
    """As bash reads them."""
    return " ".join(f"'{argument}'" for argument in arguments)


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
        return False, [name, f"FAILED: {first_line(error)}", "", ""]
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
