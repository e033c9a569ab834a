#!/usr/bin/env python3
"""Train a recipe on packed shards; a run that was stopped goes on at the exact sample."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import lightning
import yaml
from lightning.pytorch.utilities import rank_zero_only

from loaders.datamodule import ImageNetData
from loaders.decode import decoder_name
from model.checkpoint import LAST, BrokenCheckpointError, check, newest_whole
from model.classifier import Classifier, ImageBatch
from model.guards import DivergedError
from model.loggers import build_loggers
from model.lr_finder import Found, LRFinder, NoRateError
from model.networks import build_network
from model.plateau import Plateau
from model.preemption import PreemptedError, exit_status
from model.schedule import lr_at
from model.trainer import build_trainer
from recipes.schema import Recipe, as_dict, load_recipe
from sharding.errors import EXIT_USAGE, DataError, UsageError, reports_errors
from sharding.store import atomic_file

EXAMPLES = """examples:
  python train.py --config recipes/demo.yaml
  python train.py --config recipes/base.yaml data.root=/fsx/imagenet-shards --devices 8
  python train.py --config recipes/base.yaml --resume auto
  python train.py --config recipes/tiny.yaml trainer.fast_dev_run=true
  python train.py --config recipes/base.yaml --plot_lr schedule.png
  python train.py --config recipes/base.yaml --find_lr

The global batch is batch_size x devices x nodes x accumulate. It has to stay the same when a run
is resumed, on however many devices.
"""
# A flag that users know, and the recipe's key that it sets.
FLAGS = {
    "epochs": "trainer.epochs",
    "devices": "trainer.devices",
    "nodes": "trainer.nodes",
    "batch_size": "trainer.batch_size",
    "lr": "optim.lr",
    "num_workers": "data.num_workers",
    "precision": "trainer.precision",
    "wandb_project": "logging.wandb_project",
    "wandb_name": "logging.wandb_name",
}


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    options = _options(arguments)
    recipe = load_recipe(options.config, options.overrides)
    run = None if recipe.trainer.fast_dev_run else options.run or Path("runs") / recipe.name
    if options.plot_lr is not None:
        return _plot_lr(recipe, options.plot_lr)
    checkpoint = None if options.find_lr else _checkpoint(options.resume, run)

    lightning.seed_everything(recipe.seed, verbose=False)
    data = build_data(recipe)
    model = build_model(recipe, data)
    written = None if options.find_lr else run  # where the run itself is written
    trainer = build_trainer(
        recipe.trainer,
        atomic_file=atomic_file,
        run=written,
        title=recipe.model.name,
        val_samples=sum(data.val.counts),
        loggers=build_loggers(recipe.logging, written, name=recipe.name, facts=as_dict(recipe)),
        keys_of=lambda numbers: [data.train.key(number) for number in numbers],
        more=_finder(recipe, data, run, train=not options.find_lr),
    )
    rate = recipe.optim.effective_lr(recipe.trainer.global_batch)
    _say(
        f"{recipe.name}: {recipe.model.name}, {sum(data.train.counts)} training and "
        f"{sum(data.val.counts)} validation images of {len(data.train.classes)} classes, "
        f"{recipe.trainer.epochs} epochs of {data.steps(recipe.trainer.global_batch)} steps, "
        f"global batch {recipe.trainer.global_batch}, peak learning rate "
        f"{'to be found' if recipe.optim.finds_lr else format(rate, 'g')}, "
        f"{decoder_name(recipe.data.decoder)}, "
        + (f"resumed from {checkpoint}" if checkpoint else "from scratch")
    )
    if run is not None and not options.find_lr:
        _write_recipe(recipe, run)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except PreemptedError as error:
        _say(str(error))
        return exit_status(trainer.global_rank)
    except (DivergedError, NoRateError) as error:  # on all ranks; the first one's status counts
        _complain(f"{Path(sys.argv[0]).name}: error: {error}")
        status = 1 if isinstance(error, DivergedError) else EXIT_USAGE
        return status if exit_status(trainer.global_rank) else 0
    complaint = recipe.published.complaint(trainer.callback_metrics)
    if complaint is not None and recipe.trainer.runs_in_full:
        _warn(complaint)
    return 0


def build_data(recipe: Recipe) -> ImageNetData:
    """The recipe's data, opened."""
    return ImageNetData(
        recipe.data,
        seed=recipe.seed,
        batch_size=recipe.trainer.batch_size,
        accumulate=recipe.trainer.accumulate,
    )


def build_model(recipe: Recipe, data: ImageNetData) -> Classifier:
    """The recipe's model with new weights, for the data's classes and length of epoch."""
    return Classifier(
        build_network(recipe.model, len(data.train.classes)),
        classes=len(data.train.classes),
        optim=recipe.optim,
        loss=recipe.loss,
        lr_of=schedule_of(recipe, data.steps(recipe.trainer.global_batch)),
        mix=recipe.mix,
        plateau=Plateau(recipe.schedule) if recipe.schedule.name == "plateau" else None,
        seed=recipe.seed,
    )


def schedule_of(recipe: Recipe, epoch_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step; factors of it where it has to be found."""
    return partial(
        lr_at,
        config=recipe.schedule,
        peak_lr=recipe.optim.effective_lr(recipe.trainer.global_batch),
        epoch_steps=epoch_steps,
        epochs=recipe.trainer.epochs,
    )


def _finder(
    recipe: Recipe, data: ImageNetData, run: Path | None, *, train: bool
) -> list[lightning.Callback]:
    """What finds a learning rate, where that is asked for."""
    if train and not recipe.optim.finds_lr:
        return []
    plots = _plots()

    def endless() -> Iterator[ImageBatch]:
        while True:
            yield from data.train_dataloader()

    def report(found: Found) -> None:
        if run is not None:
            run.mkdir(parents=True, exist_ok=True)
            (run / "lr_finder.json").write_text(json.dumps(found.facts(), indent=1) + "\n")
            plots.plot_finder(found, run / "lr_finder_plot.png")
        _say(
            f"learning rate found: {found.suggestion:.6g}"
            + (f" ({run}/lr_finder.json)" if run else "")
        )

    return [
        LRFinder(recipe.lr_finder, batches=endless, report=report, seed=recipe.seed, train=train)
    ]


def _plot_lr(recipe: Recipe, path: Path) -> int:
    """Draw the schedule of the recipe over the steps that its data makes."""
    plots = _plots()
    data = build_data(recipe)
    epoch_steps = data.steps(recipe.trainer.global_batch)
    plots.plot_schedule(
        schedule_of(recipe, epoch_steps),
        epoch_steps=epoch_steps,
        epochs=recipe.trainer.epochs,
        path=path,
    )
    _say(f"{path}: {recipe.schedule.name}, {recipe.trainer.epochs} epochs of {epoch_steps} steps")
    return 0


def _plots() -> ModuleType:
    """Raises UsageError where matplotlib is missing: at the start, not where there is a result."""
    try:
        return import_module("model.plots")
    except ModuleNotFoundError as error:
        raise UsageError(
            "learning rates are drawn with matplotlib, which is missing: "
            "pip install 'shardstream[plots]'"
        ) from error


def _checkpoint(resume: str | None, run: Path | None) -> Path | None:
    """The checkpoint to start from.

    Raises UsageError where one is missing, or in the way, DataError where one is broken and there
    is no other.
    """
    last = None if run is None else run / "checkpoints" / LAST
    if resume == "auto":
        return None if last is None else _newest(last.parent)
    if resume is not None:
        if not Path(resume).is_file():
            raise UsageError(f"there is no checkpoint {resume}")
        try:
            check(Path(resume))
        except BrokenCheckpointError as error:
            raise DataError(str(error)) from error
        return Path(resume)
    if last is not None and last.exists():
        raise UsageError(
            f"{run} holds a run already; go on with it (--resume auto), choose another folder "
            "(--run FOLDER) or remove it"
        )
    return None


def _newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; broken ones that are newer are named."""
    path, broken = newest_whole(folder)
    if broken and path is None:
        raise DataError(f"{broken[0]}; {folder} has no whole checkpoint, start a new run")
    for line in broken:
        _warn(f"{line}; going on from {path}")
    return path


def _warn(text: str) -> None:
    _complain(f"warning: {text}")


@rank_zero_only
def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


@rank_zero_only
def _write_recipe(recipe: Recipe, run: Path) -> None:
    """Leave the resolved recipe beside what it made."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(as_dict(recipe), sort_keys=False))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the recipe")
    parser.add_argument(
        "--resume",
        metavar="PATH|auto",
        help="checkpoint to go on from; auto: the run's last, if any",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="for all output (default: runs/ and the recipe's name)",
    )
    parser.add_argument(
        "--find_lr", action="store_true", help="find a learning rate, and do not train"
    )
    parser.add_argument(
        "--plot_lr", type=Path, metavar="PNG", help="draw the schedule, and do not train"
    )
    parser.add_argument("--no_wandb", action="store_true", help="short for logging.wandb=false")
    for flag, key in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="X", help=f"short for {key}=X")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any value of the recipe"
    )
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.error(f"what shall be trained? Give a recipe\n\n{EXAMPLES}")
    options = parser.parse_intermixed_args(arguments)
    flags = {key: getattr(options, flag) for flag, key in FLAGS.items()}
    if options.wandb_project or options.wandb_name:
        flags["logging.wandb"] = "true"
    if options.no_wandb:
        flags["logging.wandb"] = "false"
    options.overrides[:0] = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return options


if __name__ == "__main__":
    sys.exit(main())
