#!/usr/bin/env python3
"""Evaluate a checkpoint on the validation split: every image exactly once."""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from loaders.datamodule import ImageNetData
from model.classifier import Classifier
from model.confusion import ConfusionMatrix
from model.first_line import first_line
from model.hashes import BrokenCheckpointError, check
from model.networks import build_network, misfit
from model.trainer import build_trainer
from recipes.schema import Recipe, load_recipe
from recipes.start import local_checkpoint
from sharding.console import positive
from sharding.errors import DataError, UsageError, reports_errors
from sharding.store import atomic_file

EXAMPLES = """examples:
  python eval.py --config recipes/demo.yaml --checkpoint runs/demo/checkpoints/last.ckpt
  python eval.py --config recipes/base.yaml --checkpoint last.ckpt --size 256 --flip
  python eval.py --config recipes/base.yaml --checkpoint last.ckpt --tables evaluation
  python eval.py --config recipes/base.yaml --checkpoint s3://bucket/base/last.ckpt
"""
_LABELLED = 40  # classes that still have room for their names beside a picture
_NUMBERED = 20  # and for a number in each cell of it


class Flipped(nn.Module):
    """The mean of a network's logits for an image and for its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        logits: torch.Tensor = (self.network(images) + self.network(images.flip(3))) / 2
        return logits


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    options = _options(arguments)
    recipe = _recipe(options)
    plot = None if options.tables is None else _pyplot()
    data = ImageNetData(recipe.data, seed=recipe.seed, batch_size=recipe.trainer.batch_size)
    model = new_model(recipe, len(data.val.classes))
    with local_checkpoint(options.checkpoint) as path:
        weights = load_weights(model, path, options.weights)
    if options.flip:
        model.network = Flipped(model.network)
    samples = sum(data.val.counts)
    trainer = build_trainer(recipe.trainer, atomic_file=atomic_file, run=None, val_samples=samples)
    matrix = ConfusionMatrix(len(data.val.classes))
    trainer.callbacks.append(matrix)  # type: ignore[attr-defined]
    (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    facts = {"checkpoint": options.checkpoint, "weights": weights, "images": samples}
    _report(facts | dict(metrics), options.json)
    if plot is not None:
        write_tables(options.tables, data.val.classes, matrix, plot)
    return 0


def new_model(recipe: Recipe, classes: int) -> Classifier:
    """The recipe's model, to be filled from a checkpoint."""
    return Classifier(
        build_network(recipe.model, classes),
        classes=classes,
        optim=recipe.optim,
        loss=recipe.loss,
        lr_of=lambda step: 0.0,
    )


def load_weights(model: nn.Module, path: Path, which: str = "best") -> str:
    """Fill a model from a checkpoint; returns which weights these are: 'raw' or 'ema'.

    which: raw, ema, or best: the averaged ones where the checkpoint has them. Raises DataError if
    the file was damaged, UsageError if it is of another network or number of classes, or has no
    such weights.
    """
    try:
        check(path)
    except BrokenCheckpointError as error:
        raise DataError(str(error)) from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "state_dict" not in checkpoint:
            raise ValueError("it is no checkpoint of a run, but of weights alone")
        # Lightning's WeightAveraging puts the average into state_dict, and what it averaged aside.
        averaged = "current_model_state" in checkpoint
        chosen = which if which != "best" else "ema" if averaged else "raw"
        raw = "current_model_state" if averaged else "state_dict"
        state = checkpoint[raw if chosen == "raw" else "state_dict"]
        if found := misfit(state, model.state_dict()):
            raise ValueError(f"{found}; is it of another model.name, or of other classes?")
        model.load_state_dict(state)
    except Exception as error:
        raise UsageError(f"{path} does not fit this recipe: {first_line(error)}") from error
    if chosen == "ema" and not averaged:
        raise UsageError(f"{path} holds no averaged weights; --weights raw evaluates those it has")
    return chosen


@rank_zero_only
def write_tables(folder: Path, classes: tuple[str, ...], matrix: ConfusionMatrix, plt: Any) -> None:
    """per_class.csv, confusion.csv (rows: the classes, columns: what they were taken for), .png."""
    folder.mkdir(parents=True, exist_ok=True)
    confusion: npt.NDArray[np.int64] = matrix.counts.cpu().numpy()
    top5 = matrix.top5.tolist()
    with (folder / "per_class.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["class", "images", "acc1", "acc5", "mostly_taken_for", "times"])
        for label, name in enumerate(classes):
            row = confusion[label]
            images = int(row.sum())
            wrong = row.copy()
            wrong[label] = 0
            worst, times = int(wrong.argmax()), int(wrong.max())
            shares = [
                f"{hits / images:.4f}" if images else "" for hits in (row[label], top5[label])
            ]
            table.writerow([name, images, *shares, classes[worst] if times else "", times])
    with (folder / "confusion.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["class", *classes])
        table.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
    figure, axes = plt.subplots(figsize=(9, 8), constrained_layout=True)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # The root shows rare confusions beside a diagonal near 1.
    picture = axes.imshow(np.sqrt(shares), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the class's images")
    bar.set_ticks([0, 0.1, 0.32, 0.55, 0.77, 1], labels=["0", "1%", "10%", "30%", "60%", "100%"])
    axes.set(xlabel="taken for", ylabel="class")
    if len(classes) <= _LABELLED:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= _NUMBERED:
        for row, column in np.argwhere(confusion):
            dark = "white" if shares[row, column] < 0.4 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", color=dark)
    figure.savefig(folder / "confusion.png", dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    """Raises UsageError where matplotlib is missing: before, not after an hour's evaluation."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  (optional)
    except ModuleNotFoundError as error:
        raise UsageError(
            "--tables draws with matplotlib, which is missing: pip install 'shardstream[plots]'"
        ) from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt


@rank_zero_only
def _report(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts), flush=True)
        return
    for name, value in facts.items():
        if name == "val/seen":  # the images again; that they are is checked
            continue
        print(f"{name:<12}{value:.4f}" if isinstance(value, float) else f"{name:<12}{value}")


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe at the resolution that was asked for."""
    recipe = load_recipe(options.config, options.overrides)
    sizes = []
    if options.size:
        same_share = recipe.data.val_resize * options.size / recipe.data.val_size
        sizes = [f"data.val_size={options.size}", f"data.val_resize={round(same_share)}"]
    if options.resize:
        sizes.append(f"data.val_resize={options.resize}")
    return load_recipe(options.config, [*options.overrides, *sizes]) if sizes else recipe


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the recipe")
    parser.add_argument("--checkpoint", required=True, metavar="PATH|URL")
    parser.add_argument(
        "--weights",
        choices=("best", "raw", "ema"),
        default="best",
        help="best: the averaged ones (EMA) where the checkpoint has them, else raw (default)",
    )
    parser.add_argument("--size", type=positive, metavar="PX", help="side of the centre crop")
    parser.add_argument(
        "--resize",
        type=positive,
        metavar="PX",
        help="shorter side before the crop (default: in the recipe's proportion to the crop)",
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="FOLDER",
        help="write per_class.csv, confusion.csv and confusion.png there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any value of the recipe"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
