"""Learning rates to look at: the one that is found, and a recipe's schedule."""

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from loaders.datamodule import ImageNetData
from model.classifier import ImageBatch
from model.lr_finder import Found, LRFinder
from recipes.build import build_data, schedule_of
from recipes.schema import Recipe
from sharding.console import count
from sharding.errors import UsageError
from sharding.store import atomic_file


def build_finder(
    recipe: Recipe, data: ImageNetData, run: Path | None, *, train: bool, say: Callable[[str], None]
) -> LRFinder:
    """What finds a learning rate at the start of training.

    run: where lr_finder.json and its picture go, if anywhere. train: whether the run then goes on
    with what was found. Raises UsageError where matplotlib is missing.
    """
    plots = _plots()

    def endless() -> Iterator[ImageBatch]:
        while True:
            yield from data.train_dataloader()

    def report(found: Found) -> None:
        if run is not None:
            with atomic_file(run / "lr_finder.json") as stream:
                stream.write(f"{json.dumps(found.facts(), indent=1)}\n".encode())
            plots.plot_finder(found, run / "lr_finder_plot.png")
        say(
            f"learning rate found: {found.suggestion:.6g}"
            + (f" ({run}/lr_finder_plot.png)" if run else "")
            + ("" if train else f"; to train with it: --lr {found.suggestion:.3g}")
        )

    return LRFinder(recipe.lr_finder, batches=endless, report=report, seed=recipe.seed, train=train)


def plot_schedule(recipe: Recipe, path: Path) -> str:
    """Draw the schedule of the recipe over the steps that its data makes; what was drawn.

    Raises UsageError where matplotlib is missing.
    """
    plots = _plots()
    epoch_steps = build_data(recipe).steps(recipe.trainer.global_batch)
    plots.plot_schedule(
        schedule_of(recipe, epoch_steps),
        epoch_steps=epoch_steps,
        epochs=recipe.trainer.epochs,
        path=path,
    )
    epochs = count(recipe.trainer.epochs, "epoch")
    return f"{path}: {recipe.schedule.name}, {epochs} of {count(epoch_steps, 'step')}"


def _plots() -> ModuleType:
    """Raises UsageError where matplotlib is missing: at the start, not where there is a result."""
    try:
        return import_module("model.plots")
    except ModuleNotFoundError as error:
        raise UsageError(
            "learning rates are drawn with matplotlib, which is missing: "
            "pip install 'shardstream[plots]'"
        ) from error
