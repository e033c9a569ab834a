"""plot_run: several runs on one sheet, told apart."""

from pathlib import Path

import pytest
from PIL import Image

from scripts import plot_run
from scripts.view_logs import plot, read_metrics
from tests.runs import write_csv

TITLES = [
    "loss",
    "top-1 accuracy",
    "learning rate",
    "images/s of a device",
    "share of the time spent waiting for data",
]


def write_run(folder: Path, height: float) -> Path:
    """A run of 12 steps whose values are multiples of `height`."""
    rows: list[dict[str, float]] = [
        {
            "step": step,
            "train/loss": height * step,
            "train/acc1": 0.1,
            "lr": height,
            "data/images_per_s": 100.0,
            "data/wait_fraction": 0.0,
        }
        for step in range(12)
    ]
    write_csv(folder, 0, [*rows, {"step": 11, "val/loss": 50 * height}])
    return folder


@pytest.mark.parametrize("count", [2, 13])
def test_each_run_has_a_colour_and_each_metric_its_dashes(tmp_path: Path, count: int) -> None:
    """Also more runs than matplotlib has colours; the legends say which is which."""
    folders = [write_run(tmp_path / f"run-{i}", i + 1.0) for i in range(count)]
    runs = {folder.name: read_metrics(folder) for folder in folders}
    figure = plot(runs, plot_run.PANELS)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == TITLES
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    colours = [line.get_color() for line in legend.get_lines()]
    assert len(set(colours)) == count
    curves = [line for line in panels[0].get_lines() if len(line.get_xdata())]
    kinds = {line.get_label(): line.get_linestyle() for line in panels[0].get_legend().get_lines()}
    assert kinds == {"train/loss": "-", "val/loss": "--"}
    markers = {line.get_marker() for line in panels[0].get_legend().get_lines()}
    assert markers == {curve.get_marker() for curve in curves} == {"o"}  # few points
    for i, colour in enumerate(colours):
        train, val = (line for line in curves if line.get_color() == colour)
        assert train.get_ydata().tolist() == [(i + 1.0) * step for step in range(12)]
        assert val.get_ydata().tolist() == [50 * (i + 1.0)]
        assert (train.get_linestyle(), val.get_linestyle()) == ("-", "--")


def test_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the first run's folder, or where it is asked for; its path is printed."""
    one, other = (write_run(tmp_path / name, 1.0) for name in ("one", "other"))
    assert plot_run.main([str(one), str(other)]) == 0
    assert plot_run.main([str(other), "--out", str(tmp_path / "new/sheet.png")]) == 0
    assert capsys.readouterr().out == f"{one}/curves.png\n{tmp_path}/new/sheet.png\n"
    for path in (one / "curves.png", tmp_path / "new/sheet.png"):
        with Image.open(path) as picture:
            assert picture.width > 1000


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """By their paths."""
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert plot_run.run_names(folders) == list(map(str, folders))
    assert plot_run.run_names([*folders[:1], tmp_path / "z"]) == ["run", "z"]


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No logs, or none that are drawn: one line, status 2, no picture."""
    assert plot_run.main([str(write_run(tmp_path / "a", 1.0)), str(tmp_path / "b")]) == 2
    assert f"{tmp_path}/b holds no logs" in capsys.readouterr().err
    write_csv(tmp_path / "c", 0, [{"step": 1, "val/seen": 3.0}])
    assert plot_run.main([str(tmp_path / "c")]) == 2
    assert "nothing that can be drawn was logged yet" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
