#!/usr/bin/env python3
"""What the launchers need to know of a command line of train.py, before anything is started.

Takes the arguments of train.py and prints two lines: the processes of each machine, and the run's
folder. Wrong use is found here, once, and not by each process of each machine.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch

from recipes.options import train_options
from recipes.schema import Recipe, load_recipe
from sharding.errors import UsageError, reports_errors

DEVICES = "trainer.devices="


def recipe_here(config: Path, overrides: Sequence[str], *, count: Callable[[], int]) -> Recipe:
    """The recipe with the processes that each machine is to have.

    That is what the user named, else one for each GPU; a recipe for the CPU has its own number.
    count: how many GPUs there are here. Raises UsageError where there are none, and for what the
    recipe itself is wrong in.
    """
    if any(override.startswith(DEVICES) for override in overrides):
        return load_recipe(config, overrides)
    found = count()
    # Loaded with the number that counts: a global batch may be possible with that one alone.
    recipe = load_recipe(config, [*overrides, f"{DEVICES}{found}"] if found else overrides)
    if recipe.trainer.accelerator == "cpu":
        return load_recipe(config, overrides)
    if not found:
        raise UsageError(
            "there is no GPU here; say how many processes a machine shall have (--devices N), and "
            "trainer.accelerator=cpu if they are to run on the CPU"
        )
    return recipe


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Print number of processes and folder; returns the exit status."""
    options = train_options(__doc__, arguments)
    recipe = recipe_here(options.config, options.overrides, count=torch.cuda.device_count)
    if options.nodes is not None and str(recipe.trainer.nodes) != options.nodes:
        raise UsageError(
            f"trainer.nodes={recipe.trainer.nodes}, but {options.nodes} machines are started; "
            "leave trainer.nodes away"
        )
    folder = str(options.run or Path("runs") / recipe.name)
    if "\n" in folder:
        raise UsageError(f"{folder!r} has a line break; choose another folder (--run FOLDER)")
    print(recipe.trainer.devices)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
