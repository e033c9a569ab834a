"""model/plots.py: the pictures show what they are of."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from model.lr_finder import Found
from model.plots import plot_finder, plot_schedule


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *arguments: object, **options: object) -> None:
        saved.append(self)
        original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.mark.parametrize("epoch_steps", [3, 5000])
def test_a_schedule_is_drawn_from_its_first_step_to_its_last(
    tmp_path: Path, figures: list[Figure], epoch_steps: int
) -> None:
    """Over epochs; a long run by some of its steps."""
    path = tmp_path / "folder" / "lr.png"
    plot_schedule(float, epoch_steps=epoch_steps, epochs=4, path=path)
    (line,) = figures[0].axes[0].lines
    xs, ys = np.array(line.get_xdata()), np.array(line.get_ydata())
    assert (xs[0], ys[0]) == (0, 0)
    assert ys[-1] == 4 * epoch_steps - 1
    assert xs == pytest.approx(ys / epoch_steps)
    assert len(xs) == min(4 * epoch_steps, 4001)
    with Image.open(path) as image:
        assert image.format == "PNG"


def test_the_finders_picture_marks_the_suggestion(tmp_path: Path, figures: list[Figure]) -> None:
    """Both curves over a logarithmic axis, and the rate in words."""
    losses = [3.0, 2.5, 1.0, 9.0]
    found = Found(
        suggestion=0.01, rates=[0.001, 0.01, 0.1, 1.0], losses=losses, smoothed=[3.0, 2.6, 1.5, 4.0]
    )
    plot_finder(found, tmp_path / "plot.png")
    axes = figures[0].axes[0]
    assert axes.get_xscale() == "log"
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [losses, found.smoothed]  # type: ignore[arg-type]
    legend = axes.get_legend()
    assert legend is not None
    assert "steepest: 0.01" in [text.get_text() for text in legend.get_texts()]
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
