#!/usr/bin/env python3
"""Write a run's logs as Markdown with pictures: viewlogs.md and images/, for a page or a README.

What is there is shown: the plot of the learning rate finder, the metrics over time, the GPU's
utilization and memory, throughput and waiting for data. All comes from the run's CSV files; those
of a resumed run follow each other.
"""

import argparse
import csv
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml

sys.path.append(str(Path(__file__).parents[1]))

from sharding.errors import UsageError, reports_errors

mpl.use("Agg")
import matplotlib.pyplot as plt

EXAMPLE = """example:
  python scripts/view_logs.py runs/base
"""
Metrics = dict[str, dict[int, float]]
"""Name -> step -> value."""
LR_FINDER = "lr_finder_plot.png"

_TRAINING = (
    ("loss", ("train/loss", "val/loss", "val_ema/loss")),
    ("top-1 accuracy", ("train/acc1", "val/acc1", "val_ema/acc1")),
    ("top-5 accuracy", ("train/acc5", "val/acc5", "val_ema/acc5")),
    ("learning rate", ("lr",)),
)
_GPU = (
    ("GPU utilization, %", ("device/utilization",)),
    ("GPU memory, GB", ("device/memory_gb",)),
)
_DATA = (
    ("images/s of a device", ("device/images_per_s", "data/images_per_s")),
    ("share of the time spent waiting for data", ("data/wait_fraction",)),
)


def read_metrics(run: Path) -> Metrics:
    """All CSV files of the run; where a resumed run made a step again, its value counts.

    Raises UsageError if there are none.
    """
    files = sorted(
        run.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])
    )
    if not files:
        raise UsageError(f"{run} holds no logs: there is no csv/version_*/metrics.csv")
    metrics: Metrics = {}
    for path in files:
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                for name, value in row.items():
                    if value and name not in {"step", "epoch"}:
                        metrics.setdefault(name, {})[int(row["step"])] = float(value)
    return metrics


def draw(metrics: Metrics, panels: Sequence[tuple[str, tuple[str, ...]]], path: Path) -> bool:
    """A picture of the panels that have values; False, and no picture, if none has."""
    there = [
        (title, found) for title, names in panels if (found := [n for n in names if n in metrics])
    ]
    if not there:
        return False
    rows = -(-len(there) // 2)
    figure, grid = plt.subplots(
        rows, min(len(there), 2), figsize=(11, 3.8 * rows), squeeze=False, constrained_layout=True
    )
    for axes in grid.flat[len(there) :]:
        axes.set_visible(False)
    for (title, names), axes in zip(there, grid.flat, strict=False):
        for name in names:
            _curve(axes, name, metrics[name])
        axes.set(title=title, xlabel="optimizer step")
        if title.startswith(("images", "GPU", "share")):
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _curve(axes: Any, name: str, values: dict[int, float]) -> None:
    """Few points as they are; many, pale, below their running mean."""
    steps = np.array(sorted(values))
    heights = np.array([values[step] for step in steps])
    width = len(steps) // 25
    if width < 4 or name == "lr":
        axes.plot(steps, heights, label=name, marker="o" if len(steps) <= 30 else None, ms=3)
        return
    (line,) = axes.plot(steps, heights, alpha=0.25, lw=0.8)
    mean = np.convolve(heights, np.ones(width) / width, mode="valid")
    middle = steps[(width - 1) // 2 :][: len(mean)]
    axes.plot(middle, mean, label=name, color=line.get_color())


def results(metrics: Metrics) -> list[tuple[str, str]]:
    """The rows of the table: what the last and the best validation gave, and the speed."""
    table = []
    for name in ("val/acc1", "val/acc5", "val/loss", "val_ema/acc1", "val_ema/acc5"):
        if values := metrics.get(name):
            best = (min if name.endswith("loss") else max)(values, key=values.__getitem__)
            last = max(values)
            table.append((name, f"{values[last]:.4f}, best {values[best]:.4f} at step {best}"))
    for name, unit in (
        ("data/images_per_s", ""),
        ("data/wait_fraction", ""),
        ("device/utilization", " %"),
    ):
        if values := metrics.get(name):
            table.append((name, f"{np.median(list(values.values())):,.4g}{unit} (median)"))
    table.append(("last step", f"{max(max(values) for values in metrics.values())}"))
    return table


def write_page(run: Path, out: Path) -> Path:
    """viewlogs.md, and its pictures beside it in images/."""
    metrics = read_metrics(run)
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = [f"# {run.resolve().name}", "", *_recipe(run)]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in results(metrics))]
    if (run / LR_FINDER).exists():
        shutil.copy(run / LR_FINDER, images / LR_FINDER)
    pictures = (
        ("Learning rate finder", LR_FINDER, (images / LR_FINDER).exists(), "it was not used"),
        ("Metrics over time", "metrics.png", draw(metrics, _TRAINING, images / "metrics.png"), ""),
        ("GPU utilization", "gpu.png", draw(metrics, _GPU, images / "gpu.png"), "none was logged"),
        (
            "Throughput and waiting for data",
            "data.png",
            draw(metrics, _DATA, images / "data.png"),
            "",
        ),
    )
    for title, name, there, otherwise in pictures:
        text = f"![{title}](images/{name})" if there else f"Not here: {otherwise or 'not logged'}."
        lines += ["", f"## {title}", "", text]
    page = out / "viewlogs.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _recipe(run: Path) -> list[str]:
    """A line on what was trained, from the recipe that the run left."""
    path = run / "recipe.yaml"
    if not path.exists():
        return []
    recipe = yaml.safe_load(path.read_text())
    trainer = recipe["trainer"]
    text = (
        f"{recipe['model']['name']} by recipe {recipe['name']}: {trainer['epochs']} epochs, "
        f"{trainer['batch_size']} images a device, {trainer['devices']} x {trainer['nodes']} "
        f"devices, {trainer['precision']}. All settings: recipe.yaml."
    )
    return [text, ""]


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the page (default: RUN)")
    options = parser.parse_args(arguments)
    print(write_page(options.run, options.out or options.run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
