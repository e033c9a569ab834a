#!/usr/bin/env python3
"""Evaluate a checkpoint on the validation split: every image exactly once."""

import argparse
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from loaders.datamodule import ImageNetData
from model.classifier import Classifier
from model.networks import build_network
from model.trainer import build_trainer
from recipes.schema import load_recipe
from sharding.errors import UsageError, reports_errors
from sharding.store import atomic_file

EXAMPLE = """example:
  python eval.py --config recipes/demo.yaml --checkpoint runs/demo/checkpoints/last.ckpt
"""


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    options = _options(arguments)
    recipe = load_recipe(options.config, options.overrides)
    if not options.checkpoint.is_file():
        raise UsageError(f"there is no checkpoint {options.checkpoint}")
    data = ImageNetData(recipe.data, seed=recipe.seed, batch_size=recipe.trainer.batch_size)
    classes = len(data.val.classes)
    model = Classifier(
        build_network(recipe.model, classes),
        classes=classes,
        optim=recipe.optim,
        loss=recipe.loss,
        lr_of=lambda step: 0.0,
    )
    _load_weights(model, options.checkpoint)
    samples = sum(data.val.counts)
    trainer = build_trainer(recipe.trainer, atomic_file=atomic_file, run=None, val_samples=samples)
    (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    _report({"checkpoint": str(options.checkpoint), "images": samples, **metrics}, options.json)
    return 0


def _load_weights(model: Classifier, checkpoint: Path) -> None:
    """Raises UsageError if the checkpoint is of another network or another number of classes."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict(state)
    except Exception as error:
        raise UsageError(
            f"{checkpoint} does not fit this recipe: {str(error).splitlines()[0]}"
        ) from error


@rank_zero_only
def _report(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:<12}{value:.4f}" if isinstance(value, float) else f"{name:<12}{value}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the recipe")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any value of the recipe"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
