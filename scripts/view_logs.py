#!/usr/bin/env python3
"""Write a run's logs as Markdown with pictures: viewlogs.md and images/, for a page or a README.

What is there is shown: the plot of the learning rate finder, the metrics over time, the GPU's
utilization and memory, throughput and waiting for data. All comes from the run's CSV files; those
of a resumed run follow each other.
"""

import argparse
import colorsys
import csv
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.append(str(Path(__file__).parents[1]))

from sharding.errors import UsageError, reports_errors

EXAMPLE = """example:
  python scripts/view_logs.py runs/base
"""
Metrics = dict[str, dict[int, float]]
"""Name -> optimizer steps done by then -> value."""
Panel = tuple[str, tuple[str, ...]]
"""Title, and the metrics that share it."""
LR_FINDER = "lr_finder_plot.png"

LOSS: Panel = ("loss", ("train/loss", "val/loss", "val_ema/loss"))
ACCURACY: Panel = ("top-1 accuracy", ("train/acc1", "val/acc1", "val_ema/acc1"))
RATE: Panel = ("learning rate", ("lr",))
DATA: tuple[Panel, ...] = (
    ("images/s of a device", ("device/images_per_s", "data/images_per_s")),
    ("share of the time spent waiting for data", ("data/wait_fraction",)),
)
_TRAINING = (
    LOSS,
    ACCURACY,
    ("top-5 accuracy", ("train/acc5", "val/acc5", "val_ema/acc5")),
    RATE,
)
_GPU = (
    ("GPU utilization, %", ("device/utilization",)),
    ("GPU memory, GB", ("device/memory_gb",)),
)
_DASHES = ("-", "--", ":")
_DOTTED = 30  # points that are seen one by one
_CYCLE = 10  # colours that matplotlib gives by number


def read_metrics(run: Path) -> Metrics:
    """All CSV files of the run, whose steps count from 0.

    Where a resumed run made a step again, its value counts.

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
                        metrics.setdefault(name, {})[int(row["step"]) + 1] = float(value)
    return metrics


def draw(runs: Mapping[str, Metrics], panels: Sequence[Panel], path: Path) -> bool:
    """A picture of the panels that have values; False, and no picture, if none has."""
    figure = plot(runs, panels)
    if figure is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def plot(runs: Mapping[str, Metrics], panels: Sequence[Panel]) -> Any:
    """The panels that have values, as a figure of matplotlib; None if none has.

    runs: by name. Of one run each metric has a colour; of several each run has one, and the metrics
    differ in their dashes. Raises UsageError where matplotlib is missing.
    """
    there = [
        (title, found)
        for title, names in panels
        if (found := [name for name in names if any(name in run for run in runs.values())])
    ]
    if not there:
        return None
    last = max(max(values) for run in runs.values() for values in run.values()) or 1
    columns, rows = min(len(there), 2), -(-len(there) // 2)
    figure = _figure((11, 3.8 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(there) :]:
        axes.set_visible(False)
    for (title, names), axes in zip(there, grid.flat, strict=False):
        _fill(axes, runs, names)
        axes.set(title=title, xlabel="optimizer step", xlim=(-0.03 * last, 1.03 * last))
        if title.startswith(("images", "GPU", "share")):
            least = 0.1 if title.startswith("share") else 0  # 1% of waiting is no mountain
            axes.set_ylim(0, max(axes.get_ylim()[1], least))
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        keys = [grid.flat[0].plot([], [], color=c, lw=3)[0] for c in _colours(len(runs))]
        figure.legend(keys, list(runs), loc="outside upper left", ncols=min(len(runs), 4))
    return figure


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        raise UsageError(
            "curves are drawn with matplotlib, which is missing: pip install 'shardstream[plots]'"
        ) from error
    return Figure(figsize=size, layout="constrained")


def _fill(axes: Any, runs: Mapping[str, Metrics], names: Sequence[str]) -> None:
    """The curves of one panel, and which metric is which if there are several."""
    alone = len(runs) == 1
    colours = _colours(len(runs))
    for run, metrics in enumerate(runs.values()):
        for kind, name in enumerate(names):
            style = {"color": f"C{kind}"} if alone else {"color": colours[run], "ls": _DASHES[kind]}
            if values := metrics.get(name):
                _curve(axes, name, values, style)
    if len(names) > 1:
        for kind, name in enumerate(names):  # without values, for the legend
            style = {"color": f"C{kind}"} if alone else {"color": "black", "ls": _DASHES[kind]}
            few = any(len(run.get(name, ())) <= _DOTTED for run in runs.values())
            axes.plot([], [], label=name, marker="o" if few else None, ms=3, **style)
        axes.legend()


def _colours(runs: int) -> list[Any]:
    """One for each run."""
    if runs <= _CYCLE:
        return [f"C{run}" for run in range(runs)]
    return [colorsys.hsv_to_rgb(run / runs, 0.9, 0.8) for run in range(runs)]


def _curve(axes: Any, name: str, values: dict[int, float], style: Mapping[str, Any]) -> None:
    """Few points as they are; many, pale, below their running mean."""
    steps = np.array(sorted(values))
    heights = np.array([values[step] for step in steps])
    width = len(steps) // 25
    if width < 4 or name == "lr":
        axes.plot(steps, heights, marker="o" if len(steps) <= _DOTTED else None, ms=3, **style)
        return
    axes.plot(steps, heights, alpha=0.25, lw=0.8, color=style["color"])
    mean = np.convolve(heights, np.ones(width) / width, mode="valid")
    axes.plot(steps[(width - 1) // 2 :][: len(mean)], mean, **style)


def results(metrics: Metrics) -> list[tuple[str, str]]:
    """The rows of the table: what the last and the best validation gave, and the speed."""
    table = []
    for name in ("val/acc1", "val/acc5", "val/loss", "val_ema/acc1", "val_ema/acc5"):
        if values := metrics.get(name):
            best = (min if name.endswith("loss") else max)(values, key=values.__getitem__)
            last = max(values)
            table.append((name, f"{values[last]:.4f}, best {values[best]:.4f} after {best} steps"))
    for name, unit in (
        ("data/images_per_s", ""),
        ("data/wait_fraction", ""),
        ("device/utilization", " %"),
    ):
        if values := metrics.get(name):
            table.append((name, f"{np.median(list(values.values())):,.4g}{unit} (median)"))
    table.append(("optimizer steps", f"{max(map(max, metrics.values()))}"))
    return table


def write_page(run: Path, out: Path) -> Path:
    """viewlogs.md, and its pictures beside it in images/."""
    metrics = read_metrics(run)
    runs = {run.resolve().name: metrics}
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = [f"# {run.resolve().name}", "", *_recipe(run)]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in results(metrics))]
    if (run / LR_FINDER).exists():
        shutil.copy(run / LR_FINDER, images / LR_FINDER)
    pictures = (
        ("Learning rate finder", LR_FINDER, (images / LR_FINDER).exists(), "it was not used"),
        ("Metrics over time", "metrics.png", draw(runs, _TRAINING, images / "metrics.png"), ""),
        ("GPU utilization", "gpu.png", draw(runs, _GPU, images / "gpu.png"), "none was logged"),
        (
            "Throughput and waiting for data",
            "data.png",
            draw(runs, DATA, images / "data.png"),
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
