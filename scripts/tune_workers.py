#!/usr/bin/env python3
"""How many loader workers does this machine need for this recipe? Measure, and recommend.

The loader alone delivers training batches that nobody uses, with 0, 1, 2, ... workers, up to the
cores that each process of the node has; from 8 on in larger steps. It ends early when twice in a
row more workers gained less than 3%. The recommendation is the fewest that reach 97% of the best
rate. Images are of the recipe's last epoch, which progressive resizing makes the largest.

One process is measured. Where several share the node's disk or memory, all of them together may be
slower: scripts/bench_train.py measures the real thing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from loaders.datamodule import ImageNetData
from loaders.topology import Topology
from recipes.build import build_data
from recipes.schema import Recipe, load_recipe
from sharding.console import cores, positive
from sharding.errors import UsageError, reports_errors

EXAMPLES = """examples:
  python scripts/tune_workers.py --config recipes/base.yaml data.root=/fsx/shards --devices 8
  python scripts/tune_workers.py --config recipes/demo.yaml --seconds 2
"""
GAIN = 1.03
"""So many times faster is a gain; less is noise."""


def candidates(most: int) -> Iterator[int]:
    """PURE: 0, 1, ..., 8, 10, 12, ..., 16, 20, ..., 32, 40, ... and `most` itself."""
    workers = 0
    while workers < most:
        yield workers
        workers += 1 << max(workers.bit_length() - 3, 0)
    yield most


def search(measure: Callable[[int], float], most: int) -> dict[int, float]:
    """Rates by number of workers, until two numbers in a row gained nothing over the best."""
    rates: dict[int, float] = {}
    idle = 0
    for workers in candidates(most):
        best = max(rates.values(), default=0.0)
        rates[workers] = measure(workers)
        idle = 0 if rates[workers] >= best * GAIN else idle + 1
        if idle == 2:
            break
    return rates


def recommend(rates: Mapping[int, float]) -> int:
    """PURE: the fewest workers whose rate the best one does not exceed by a gain."""
    best = max(rates.values())
    return min(workers for workers, rate in rates.items() if rate * GAIN >= best)


def images_per_s(data: ImageNetData, recipe: Recipe, workers: int, *, seconds: float) -> float:
    """What the loader delivers, once its queues have been filled and drained again."""
    trainer = recipe.trainer
    topology = Topology(
        global_batch=trainer.global_batch,
        world=trainer.world,
        accumulate=trainer.batches_per_step,
        repeats=recipe.data.repeats,
    )
    loader = data.train_loader(topology, workers=workers)

    def endless() -> Iterator[int]:
        for epoch in count(trainer.epochs - 1):
            loader.set_epoch(epoch)
            for batch in loader:
                yield len(batch.labels)

    batches = endless()
    for _ in range(1 + 2 * workers * recipe.data.prefetch):
        next(batches)
    images, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        images += next(batches)
    return images / passed


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and the key to set."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the recipe")
    parser.add_argument("--devices", metavar="N", help="processes of the node that share its cores")
    parser.add_argument("--most", type=positive, metavar="N", help="workers (default: the cores)")
    parser.add_argument("--seconds", type=float, default=5, help="for each number (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rates there too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if not options.seconds > 0:
        raise UsageError(f"--seconds must be more than 0, got {options.seconds:g}")
    devices = [f"trainer.devices={options.devices}"] if options.devices else []
    recipe = load_recipe(options.config, [*devices, *options.overrides])
    data = build_data(recipe)
    share = max(cores() // recipe.trainer.devices, 1)
    print(f"{recipe.name}: {share} cores for each of {recipe.trainer.devices} processes")
    print("  workers    images/s")

    def measure(workers: int) -> float:
        rate = images_per_s(data, recipe, workers, seconds=options.seconds)
        print(f"  {workers:7}{rate:12,.0f}", flush=True)
        return rate

    rates = search(measure, options.most or share)
    best = recommend(rates)
    print(f"recommended: data.num_workers={best}")
    if options.json:
        facts = {"images_per_s": rates, "recommended": best}
        options.json.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
