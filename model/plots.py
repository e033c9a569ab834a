"""Pictures of learning rates: of a schedule, and of what the finder saw."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from model.lr_finder import Found

_POINTS = 4000


def plot_schedule(
    lr_of: Callable[[int], float], *, epoch_steps: int, epochs: int, path: Path
) -> None:
    """Draw the rate of every step (or of some thousands of them) of a run over its epochs."""
    last = epochs * epoch_steps
    steps = sorted({*range(0, last, max(last // _POINTS, 1)), last - 1})
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([step / epoch_steps for step in steps], [lr_of(step) for step in steps])
    axes.set(xlabel="epoch", ylabel="learning rate", xlim=(0, epochs))
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_finder(found: Found, path: Path) -> None:
    """Draw the loss over the rate, with the suggestion."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, alpha=0.4, label="loss")
    axes.plot(found.rates, found.smoothed, label="smoothed")
    label = f"steepest: {found.suggestion:.3g}"
    axes.axvline(found.suggestion, color="tab:red", linestyle="--", label=label)
    top = 1.1 * max(found.smoothed[: len(found.smoothed) // 2 + 1])
    axes.set(xlabel="learning rate", ylabel="loss", xscale="log", ylim=(None, top))
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
