#!/usr/bin/env python3
"""The whole system on real images in a few minutes: pack, train, be killed, resume, evaluate.

It needs no GPU and no download, removes the folder demo/ and makes it anew, and prints each command
as you could type it yourself. Exit status 1 if anything is not as it must be.

  python scripts/demo.py        or: make demo
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.view_logs is found

from loaders.datamodule import open_reader
from loaders.loader import StreamingLoader
from loaders.order import Order, OrderConfig
from loaders.reader import Reader
from loaders.topology import Topology
from recipes.schema import Recipe, load_recipe
from scripts.chaos_run import trace
from scripts.view_logs import ACCURACY, LOSS, plot, read_metrics
from sharding.dataset import PackedSplit
from sharding.errors import reports_errors

DEMO = Path("demo")
RECIPE = Path("recipes/demo.yaml")
SHARDS = DEMO / "shards"
RUN = DEMO / "run"
LAST = RUN / "checkpoints" / "last.ckpt"
KILL_AT_STEP = 52  # in the middle of the third epoch, two steps behind a checkpoint
GOOD_ACCURACY = 0.97
NEXT = """What next?
  look at demo/curves.png; the run's logs and checkpoints are in demo/run/
  type `source .venv/bin/activate`, and try the commands above
  docs/03_getting_started.md goes from here to ImageNet on one machine, on FSx, and on S3"""


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the demo; exit status 1 if anything is not as it must be."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    shutil.rmtree(DEMO, ignore_errors=True)
    overrides = [f"data.root={SHARDS}"]
    recipe = load_recipe(RECIPE, overrides)
    train = ["train.py", "--config", str(RECIPE), "--run", str(RUN), *overrides]

    print(
        "Shardstream on handwritten digits, without a GPU: about 2 minutes on 2 cores. All\n"
        f"that is made goes to {DEMO}/. Lines with a $ are commands that you could type yourself."
    )
    say(
        "1. Make a data set",
        "1,797 scanned digits as an ImageFolder, the form in which ImageNet comes: a JPEG for\n"
        "each image, a folder for each class.",
    )
    run("scripts/make_demo_dataset.py", str(DEMO / "digits"))
    say(
        "2. Pack it",
        "Many small files become a few large ones: tar shards, and beside each an index that says\n"
        "where every image stands. Shards are of 300 KB here, and of 128 MB unless told.",
    )
    run("shard.py", "pack", str(DEMO / "digits"), str(SHARDS), "--shard_size", "300KB")
    say(
        "3. Train with 2 processes, and kill both in the middle of an epoch",
        "SIGKILL is what a crash looks like: no process can save anything any more. The recipe\n"
        "writes a checkpoint every 5 steps; what came after the last one is lost.",
    )
    began = time.monotonic()
    train_and_kill(train, at_step=KILL_AT_STEP)
    state = loader_state()
    say(
        "4. Go on with 1 process",
        "`--resume auto` finds the last whole checkpoint. The global batch stays the same, so\n"
        "each step must use the very images that it would have used on 2 processes.",
    )
    resumed = ["--resume", "auto", "--devices", "1"]
    run(*train, *resumed, "--batch_size", str(recipe.trainer.global_batch))
    seconds = time.monotonic() - began
    say("5. Evaluate", "Every validation image counts exactly once, on any number of processes.")
    evaluation = ["--config", str(RECIPE), "--checkpoint", str(LAST), "--json", *overrides]
    output = run("eval.py", *evaluation, "trainer.devices=1", quiet=True)
    metrics = json.loads(output.splitlines()[-1])
    say(
        "6. Check the order",
        "Both runs wrote down which images each step used. Now the loader runs from the\n"
        "beginning to the end, undisturbed and without training; each step must be the same.",
    )
    exact, repeated = compare_order(recipe)
    say("7. Draw the curves", "Loss and accuracy of both runs, one behind the other.")
    picture = plot_curves()

    order = order_of(recipe)
    global_step, batch = state["global_step"], recipe.trainer.global_batch
    first = int(
        order.part(epoch=state["epoch"], step=state["step"], batch=batch, rank=0, world=1)[0]
    )
    split = PackedSplit.open(f"{SHARDS}/train")
    shard, row = order.place(first)
    offset = int(split.read_index(shard).table["offset"][row])
    steps = recipe.trainer.epochs * order.steps(batch)
    images = (steps + repeated) * batch
    accuracy = metrics["val/acc1"]
    print_table(
        {
            "training": f"{steps} steps of {batch} images, {recipe.trainer.epochs} epochs",
            "killed (SIGKILL)": f"2 processes, at step {KILL_AT_STEP} or just behind it",
            "resumed": f"1 process, at epoch {state['epoch']}, step {state['step']} of it "
            f"(step {global_step} of the run)",
            "  first sample": f"{split.manifest.shards[shard].url}, byte offset {offset}",
            "  repeated": f"{repeated} steps since the last checkpoint",
            "order of samples": "as undisturbed, sample for sample" if exact else "DIFFERENT",
            "validation": f"{metrics['images']} images, top-1 {accuracy:.2%}",
            "speed": f"{images / seconds:.0f} images/s over steps 3 and 4, start-up included",
            "curves": str(picture),
        }
    )
    wrong = [] if exact else ["a step used other images than undisturbed"]
    if accuracy < GOOD_ACCURACY:
        wrong.append(f"top-1 is {accuracy:.2%}, below {GOOD_ACCURACY:.0%}")
    if metrics["images"] != metrics["val/seen"]:
        wrong.append(f"{metrics['val/seen']:.0f} of {metrics['images']} images were validated")
    if wrong:
        raise ChildProcessError("; ".join(wrong))
    print(NEXT)
    return 0


def say(title: str, text: str) -> None:
    """Print what comes, and why."""
    print(f"\n{title}\n{'-' * len(title)}\n{text}", flush=True)


def run(program: str, *arguments: str, quiet: bool = False) -> str:
    """Run one of our programs and show its command; its output is returned if `quiet`."""
    print(f"\n$ python {program} {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, program, *arguments],
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ChildProcessError(f"{program} ended with exit status {done.returncode}")
    return done.stdout or ""


def train_and_kill(command: list[str], *, at_step: int) -> None:
    """Start training, wait until the step's line is in the trace, kill the whole process group."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command], start_new_session=True)
    written = RUN / "samples-rank0.jsonl"
    try:
        while not written.exists() or written.read_bytes().count(b"\n") <= at_step:
            if process.poll() is not None:
                raise ChildProcessError(
                    f"training ended by itself with status {process.returncode}"
                )
            time.sleep(0.02)
    finally:  # also where the demo is interrupted, which its own session does not see
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print("killed", flush=True)


def loader_state() -> dict[str, int]:
    """Where the last checkpoint stands: epoch, optimizer step in it, and of the run."""
    checkpoint = torch.load(LAST, map_location="cpu", weights_only=True)
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return {
        "epoch": state["epoch"],
        "step": state["position"] // state["global_batch"],
        "global_step": checkpoint["global_step"],
    }


def order_of(recipe: Recipe) -> Order:
    """The order of the training split under the recipe's seed."""
    reader = open_reader(recipe.data, "train")
    return Order(reader.counts, order_config(recipe))


def order_config(recipe: Recipe) -> OrderConfig:
    """The recipe's part of the order."""
    return OrderConfig(seed=recipe.seed, lanes=recipe.data.lanes, window=recipe.data.window)


def compare_order(recipe: Recipe) -> tuple[bool, int]:
    """Whether each step used the samples of an undisturbed run, and how many steps came twice."""
    used: dict[int, list[tuple[str, ...]]] = {}
    lines = [trace(RUN, rank) for rank in range(recipe.trainer.devices)]
    # Rank 0 wrote the lines of both runs. While there were two, rank 1's part belongs behind its.
    parts = [{line["step"]: line["keys"] for line in rank} for rank in lines[1:]]
    for line in lines[0]:
        keys = line["keys"]
        if len(keys) < recipe.trainer.global_batch:
            keys = keys + [key for part in parts for key in part.get(line["step"], [])]
        used.setdefault(line["step"], []).append(tuple(keys))
    undisturbed = [tuple(step) for step in undisturbed_steps(recipe)]
    right = len(used) == len(undisturbed) and all(
        # The step in which the kill fell may lack the other rank's line.
        all(keys == undisturbed[step][: len(keys)] for keys in runs)
        and runs[-1] == undisturbed[step]
        for step, runs in used.items()
    )
    return right, sum(len(runs) - 1 for runs in used.values())


def undisturbed_steps(recipe: Recipe) -> list[list[str]]:
    """Keys of every step, from the real loader in one process, from the beginning to the end."""
    reader: Reader = open_reader(recipe.data, "train")
    loader = StreamingLoader(
        reader,
        order=order_config(recipe),
        augment=recipe.data.augment,
        topology=Topology(global_batch=recipe.trainer.global_batch),
        size=recipe.data.train_size,
        workers=0,
    )
    steps = []
    for epoch in range(recipe.trainer.epochs):
        loader.set_epoch(epoch)
        steps += [[reader.key(n) for n in batch.numbers.tolist()] for batch in loader]
    return steps


def plot_curves() -> Path:
    """Loss and accuracy over the steps of both runs, as a PNG."""
    figure = plot({"demo": read_metrics(RUN)}, (LOSS, ACCURACY))
    for axes in figure.axes:
        axes.axvline(KILL_AT_STEP, color="grey", linestyle=":", label="killed, resumed")
        axes.legend()
    picture = DEMO / "curves.png"
    figure.savefig(picture, dpi=120)
    return picture


def print_table(rows: dict[str, str]) -> None:
    """Two columns."""
    width = max(map(len, rows))
    print("\n" + "=" * 78)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print("=" * 78 + "\n")


if __name__ == "__main__":
    sys.exit(main())
