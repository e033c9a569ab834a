"""view_logs: what stands in the page, and that each of its pictures is one."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from scripts import view_logs
from tests.runs import write_csv


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was resumed at step 3, by its eleventh start."""
    folder = tmp_path / "a-run"
    first: list[dict[str, float]] = [
        {"step": s, "epoch": 0, "train/loss": 9.0 - s, "lr": 0.1} for s in range(5)
    ]
    write_csv(folder, 2, [*first, {"step": 4, "epoch": 0, "val/acc1": 0.75, "val/loss": 2.0}])
    second: list[dict[str, float]] = [
        {"step": s, "epoch": 1, "train/loss": 1.0, "data/images_per_s": 1000.0} for s in range(3, 8)
    ]
    write_csv(folder, 10, [*second, {"step": 7, "epoch": 1, "val/acc1": 0.5, "val/loss": 3.0}])
    return folder


def page_of(run: Path) -> str:
    """The page; every picture that it shows is there and can be opened."""
    assert view_logs.main([str(run)]) == 0
    text = (run / "viewlogs.md").read_text()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    for name in shown:
        with Image.open(run / name) as picture:
            assert picture.width > 100
    assert sorted(shown) == sorted(f"images/{path.name}" for path in (run / "images").iterdir())
    return text


def test_a_resumed_runs_values_count(run: Path) -> None:
    """Steps 3 and 4 were made twice; version_10 is behind version_2."""
    losses = view_logs.read_metrics(run)["train/loss"]
    assert losses == {1: 9, 2: 8, 3: 7, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}


def test_the_page_shows_what_there_is(run: Path) -> None:
    """Metrics and throughput; what was not logged is said; last and best validation."""
    text = page_of(run)
    assert "images/metrics.png" in text
    assert "images/data.png" in text
    assert "## GPU utilization\n\nNot here: none was logged." in text
    assert "## Learning rate finder\n\nNot here: it was not used." in text
    assert "| val/acc1 | 0.5000, best 0.7500 after 5 steps |" in text
    assert "| val/loss | 3.0000, best 2.0000 after 5 steps |" in text
    assert "| data/images_per_s | 1,000 (median) |" in text
    assert "| optimizer steps | 8 |" in text


def test_gpu_finder_and_recipe_where_they_are(run: Path) -> None:
    """The finder's plot is copied, not drawn anew; averaged weights have a row of their own."""
    Image.new("RGB", (321, 200)).save(run / "lr_finder_plot.png")
    recipe = {
        "name": "base",
        "model": {"name": "resnet50"},
        "trainer": {"epochs": 90, "batch_size": 32, "devices": 8, "nodes": 1, "precision": "32"},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    many: list[dict[str, float]] = [
        {"step": s, "device/utilization": s % 100, "device/memory_gb": 20.0} for s in range(300)
    ]
    write_csv(run, 11, [*many, {"step": 299, "val_ema/acc1": 0.8}])
    text = page_of(run)
    assert "resnet50 by recipe base: 90 epochs" in text
    assert "images/gpu.png" in text
    assert "| val_ema/acc1 | 0.8000, best 0.8000 after 300 steps |" in text
    with Image.open(run / "images" / "lr_finder_plot.png") as picture:
        assert picture.width == 321


def test_a_folder_without_logs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit status 2, nothing written."""
    assert view_logs.main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no logs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, status 2."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert view_logs.main([str(run)]) == 2
    err = capsys.readouterr().err
    assert "pip install 'shardstream[plots]'" in err
    assert err.count("\n") == 1
