#!/usr/bin/env python3
"""Is training limited by its input or by its device? Three rates of one recipe, in one sitting.

    roof          trains on one batch that lies on the device already
    loader alone  delivers batches that nobody uses
    end to end    trains on what the loader delivers

End to end can reach the lesser of the first two, which says what limits it. All are counted in
images a second over all processes, after steps that warm up (and compile). The first batch that
training sees on the device is compared, bit for bit, with the one that this process decodes itself.

--devices 1,2,... measures one machine with each number of processes, one after the other, the batch
of a process being the same, and prints the efficiency: the rate over that of one process times
their number. Over several machines each of them runs this program, as each would run train.py
(srun, torchrun), and --against takes the figures of one process, which --json wrote.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

sys.path.append(str(Path(__file__).parents[1]))

from loaders.decode import decoder_name
from loaders.loader import StreamingLoader
from loaders.pipeline import Batch
from loaders.topology import Topology
from model.classifier import Classifier
from model.trainer import build_strategy
from recipes.build import build_data, build_model
from recipes.schema import Recipe, load_recipe
from sharding.console import positive
from sharding.errors import DataError, UsageError, reports_errors

# Nothing is validated here.
warnings.filterwarnings("ignore", message="You defined a `validation_step`")

EXAMPLES = """examples:
  python scripts/bench_train.py --config recipes/base.yaml data.root=/fsx/imagenet-shards \\
      trainer.batch_size=256 trainer.precision=bf16-mixed model.compile=true
  python scripts/bench_train.py --config recipes/demo.yaml --steps 20
  python scripts/bench_train.py --config recipes/base.yaml --devices 1,2,4,8
  python scripts/bench_train.py --config recipes/base.yaml trainer.devices=1 --json one.json
  srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 python scripts/bench_train.py \\
      --config recipes/base.yaml trainer.devices=8 trainer.nodes=4 --against one.json
"""


Facts = dict[str, Any]
"""What --json writes of one measurement: title, processes, images_per_s and verdict."""


class Clock(lightning.Callback):
    """Times `steps` batches of training after the first `skip`, then stops it."""

    def __init__(self, *, skip: int, steps: int, first: Batch) -> None:
        """first: what has to lie on the device as the first batch."""
        self._skip, self._steps, self._first = skip, steps, first
        self._done = 0
        self._start = self.seconds = math.nan

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Raises DataError if the first batch is not what it has to be."""
        if not self._done and not all(
            torch.equal(part.cpu(), expected)
            for part, expected in zip(batch, self._first, strict=True)
        ):
            raise DataError("the first batch on the device is not the one that the CPU made")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Read the clock once the device has finished."""
        self._done += 1
        if self._done == self._skip:
            self._start = _now()
        elif self._done == self._skip + self._steps:
            self.seconds = _now() - self._start
            trainer.should_stop = True


class Resident:
    """One batch again and again, from the module's device."""

    def __init__(self, batch: Batch, module: Classifier) -> None:
        self._batch, self._module = batch, module

    def __iter__(self) -> Iterator[Batch]:
        there = Batch(*(part.to(self._module.device) for part in self._batch))
        while True:
            yield there


class Endless:
    """A loader's epochs, one behind the other."""

    def __init__(self, loader: StreamingLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for epoch in count():
            self._loader.set_epoch(epoch)
            yield from self._loader


def measure(recipe: Recipe, *, skip: int, steps: int) -> dict[str, float]:
    """Images a second over all processes, by what was measured."""
    data = build_data(recipe)
    model = build_model(recipe, data)

    def fit(batches: Iterable[Batch], first: Batch) -> float:
        clock = Clock(skip=skip, steps=steps, first=first)
        _trainer(recipe, clock).fit(model, train_dataloaders=batches)
        return clock.seconds

    trainer = _trainer(recipe)
    topology = Topology(
        global_batch=recipe.trainer.global_batch,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=recipe.trainer.batches_per_step,
    )
    first = next(iter(data.train_loader(topology, workers=0)))
    # The roof comes first: fitting starts the other processes, which then share the machine.
    seconds = {"roof": fit(Resident(first, model), first)}
    seconds["loader alone"] = _iterate(data.train_loader(topology), skip=skip, steps=steps)
    seconds["end to end"] = fit(Endless(data.train_loader(topology)), first)
    images = steps * topology.batch * topology.world
    return {what: images / each for what, each in seconds.items()}


def _iterate(loader: StreamingLoader, *, skip: int, steps: int) -> float:
    batches = iter(Endless(loader))
    for _ in range(skip):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return time.perf_counter() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _trainer(recipe: Recipe, *callbacks: lightning.Callback) -> lightning.Trainer:
    """The recipe's trainer, which neither ends nor writes."""
    config = recipe.trainer
    precision: Any = config.precision
    return lightning.Trainer(
        max_epochs=-1,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=build_strategy(config),
        precision=precision,
        accumulate_grad_batches=config.batches_per_step,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )


def verdict(rates: dict[str, float]) -> Literal["input-bound", "compute-bound"]:
    """What limits training: the slower of loader and device."""
    return "input-bound" if rates["loader alone"] < rates["roof"] else "compute-bound"


def efficiency(
    rates: Mapping[str, float], one: Mapping[str, float], *, processes: int
) -> dict[str, float]:
    """Each rate over that of one process times the number of processes; 1: nothing is lost."""
    return {what: rate / (one[what] * processes) for what, rate in rates.items()}


def scaling(command: Sequence[str], devices: Sequence[int], *, threads: int | None) -> list[Facts]:
    """Facts of a measurement with each number of processes, each by a program of its own.

    command: of this program, without the number. threads: of PyTorch in each process; None: as it
    likes. Raises ChildProcessError where one fails.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        for count in devices:
            line = [sys.executable, __file__, *command, f"trainer.devices={count}"]
            done = subprocess.run([*line, "--json", str(out)], env=environment, check=False)
            if done.returncode:
                raise ChildProcessError(
                    f"the measurement with {count} processes ended with status {done.returncode}"
                )
            measured.append(json.loads(out.read_text()))
    return measured


def table(measured: Sequence[Facts]) -> list[str]:
    """Lines: processes, and for each rate images a second and efficiency against the first."""
    one = measured[0]["images_per_s"]
    lines = ["processes" + "".join(f"{what:>28}" for what in one)]
    for facts in measured:
        rates, processes = facts["images_per_s"], facts["processes"]
        shares = efficiency(rates, one, processes=processes)
        cells = (f"{rate:>19,.1f}  {shares[what]:>6.1%}" for what, rate in rates.items())
        lines.append(f"{processes:>9}" + " ".join(["", *cells]))
    return lines


@rank_zero_only
def _report(
    recipe: Recipe, rates: dict[str, float], path: Path | None, one: Mapping[str, float] | None
) -> None:
    least = min(rates["loader alone"], rates["roof"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = (
        f"{recipe.model.name}, {recipe.trainer.precision}, batch {recipe.trainer.batch_size} x "
        f"{recipe.trainer.world} processes, {recipe.data.num_workers} workers each, "
        f"{decoder_name(recipe.data.decoder)}; {device}, torch {torch.__version__}"
    )
    print(title)
    for what, rate in rates.items():
        print(f"  {what:14}{rate:12,.1f} images/s")
    print(f"{verdict(rates)}: end to end reaches {rates['end to end'] / least:.1%} of the lesser")
    if one is not None:
        shares = efficiency(rates, one, processes=recipe.trainer.world)
        print(
            "efficiency against one process: "
            + ", ".join(f"{what} {share:.1%}" for what, share in shares.items())
        )
    if path:
        facts: Facts = {
            "title": title,
            "processes": recipe.trainer.world,
            "images_per_s": rates,
            "verdict": verdict(rates),
        }
        path.write_text(json.dumps(facts, indent=1))


def _counts(text: str) -> list[int]:
    """Numbers of processes: 1 first, for all are compared with it."""
    counts = [positive(part) for part in text.split(",")]
    if counts[0] != 1 or sorted(set(counts)) != counts:
        raise argparse.ArgumentTypeError(f"must rise from 1, like 1,2,4; got {text}")
    return counts


def _one(path: Path) -> dict[str, float]:
    """The rates of one process. Raises UsageError where the file holds none."""
    try:
        facts = json.loads(path.read_text())
        if facts["processes"] == 1:
            return {what: float(rate) for what, rate in facts["images_per_s"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--against {path}: no figures that --json wrote ({error!r})") from error
    raise UsageError(f"--against {path}: these are {facts['processes']} processes, not one")


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the recipe")
    parser.add_argument("--steps", type=positive, default=100, help="that count (%(default)s)")
    parser.add_argument("--skip", type=positive, default=20, help="before these (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there too")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--devices", type=_counts, metavar="1,2,...", help="measure each number")
    how.add_argument("--against", type=Path, metavar="OUT", help="of one process: its --json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(options.config, options.overrides)
    if options.devices:
        return _scale(recipe, options)
    one = options.against and _one(options.against)
    lightning.seed_everything(recipe.seed, verbose=False)
    rates = measure(recipe, skip=options.skip, steps=options.steps)
    _report(recipe, rates, options.json, one)
    return 0


def _scale(recipe: Recipe, options: argparse.Namespace) -> int:
    threads = None
    if recipe.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        # One process would take all cores, and two half of them each: no devices to compare.
        threads = max(1, (os.cpu_count() or 1) // max(options.devices))
    command = [
        "--config",
        str(options.config),
        f"--steps={options.steps}",
        f"--skip={options.skip}",
    ]
    measured = scaling([*command, *options.overrides], options.devices, threads=threads)
    print()
    print("\n".join(table(measured)))
    if threads is not None:
        print(
            f"On {os.cpu_count()} CPU cores, which processes and their loaders share; PyTorch has "
            f"{threads} thread{'s' if threads > 1 else ''} in each. This says nothing of GPUs."
        )
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
