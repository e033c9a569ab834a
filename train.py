#!/usr/bin/env python3
"""Train a recipe on packed shards; a run that was stopped goes on at the exact sample."""

import argparse
import sys
from functools import partial
from pathlib import Path

import lightning
import yaml
from lightning.pytorch.utilities import rank_zero_only

from loaders.datamodule import ImageNetData
from loaders.decode import decoder_name
from model.checkpoint import LAST
from model.classifier import Classifier
from model.networks import build_network
from model.schedule import lr_at
from model.trainer import build_trainer
from recipes.schema import Recipe, as_dict, load_recipe
from sharding.errors import UsageError, reports_errors
from sharding.store import atomic_file

EXAMPLES = """examples:
  python train.py --config recipes/demo.yaml
  python train.py --config recipes/base.yaml data.root=/fsx/imagenet-shards --devices 8
  python train.py --config recipes/base.yaml --resume auto
  python train.py --config recipes/tiny.yaml trainer.fast_dev_run=true

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
}


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    options = _options(arguments)
    recipe = load_recipe(options.config, options.overrides)
    run = None if recipe.trainer.fast_dev_run else options.run or Path("runs") / recipe.name
    checkpoint = _checkpoint(options.resume, run)

    lightning.seed_everything(recipe.seed, verbose=False)
    data = build_data(recipe)
    model = build_model(recipe, data)
    trainer = build_trainer(
        recipe.trainer,
        atomic_file=atomic_file,
        run=run,
        title=recipe.model.name,
        val_samples=sum(data.val.counts),
        keys_of=lambda numbers: [data.train.key(number) for number in numbers],
    )
    _say(
        f"{recipe.name}: {recipe.model.name}, {sum(data.train.counts)} training and "
        f"{sum(data.val.counts)} validation images of {len(data.train.classes)} classes, "
        f"{recipe.trainer.epochs} epochs of {data.steps(recipe.trainer.global_batch)} steps, "
        f"global batch {recipe.trainer.global_batch}, peak learning rate "
        f"{recipe.optim.effective_lr(recipe.trainer.global_batch):g}, "
        f"{decoder_name(recipe.data.decoder)}, "
        + (f"resumed from {checkpoint}" if checkpoint else "from scratch")
    )
    if run is not None:
        _write_recipe(recipe, run)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
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
        lr_of=partial(
            lr_at,
            config=recipe.schedule,
            peak_lr=recipe.optim.effective_lr(recipe.trainer.global_batch),
            epoch_steps=data.steps(recipe.trainer.global_batch),
            epochs=recipe.trainer.epochs,
        ),
    )


def _checkpoint(resume: str | None, run: Path | None) -> Path | None:
    """The checkpoint to start from. Raises UsageError where one is missing, or in the way."""
    last = None if run is None else run / "checkpoints" / LAST
    if resume == "auto":
        return last if last is not None and last.exists() else None
    if resume is not None:
        if not Path(resume).is_file():
            raise UsageError(f"there is no checkpoint {resume}")
        return Path(resume)
    if last is not None and last.exists():
        raise UsageError(
            f"{run} holds a run already; go on with it (--resume auto), choose another folder "
            "(--run FOLDER) or remove it"
        )
    return None


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
    for flag, key in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="X", help=f"short for {key}=X")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any value of the recipe"
    )
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.error(f"what shall be trained? Give a recipe\n\n{EXAMPLES}")
    options = parser.parse_intermixed_args(arguments)
    flags = {key: getattr(options, flag) for flag, key in FLAGS.items()}
    options.overrides[:0] = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return options


if __name__ == "__main__":
    sys.exit(main())
