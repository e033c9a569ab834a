"""eval.py: which weights, at which resolution, with the mirror image; tables that add up."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eval as program
from model.confusion import ConfusionMatrix
from recipes.build import build_data, build_model
from recipes.schema import load_recipe
from tests.runs import run


@pytest.fixture
def checkpoint(small_recipe: Path, tmp_path: Path) -> Path:
    """A checkpoint of random weights, with averaged ones that differ."""
    recipe = load_recipe(small_recipe)
    torch.manual_seed(3)
    average, raw = (program.new_model(recipe, 3).state_dict() for _ in range(2))
    path = tmp_path / "both.ckpt"
    torch.save({"state_dict": average, "current_model_state": raw}, path)
    torch.save({"state_dict": raw}, tmp_path / "raw.ckpt")
    return path


def evaluate(
    capsys: pytest.CaptureFixture[str], recipe: Path, checkpoint: Path, *arguments: str
) -> dict[str, Any]:
    """The facts that eval.py --json prints."""
    line = ["--config", str(recipe), "--checkpoint", str(checkpoint), "--json", *arguments]
    assert program.main(line) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return facts


def test_what_is_printed_is_for_people(
    small_recipe: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each fact, and none twice."""
    assert program.main(["--config", str(small_recipe), "--checkpoint", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "checkpoint", "weights", "images", "val/loss", "val/acc1", "val/acc5",
    ]  # fmt: skip
    assert lines[1].split() == ["weights", "ema"]
    assert lines[2].split() == ["images", "13"]


def test_raw_and_averaged_weights(
    small_recipe: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is evaluated by its name; 'best' is the averaged ones where there are any."""
    found = {
        which: evaluate(capsys, small_recipe, checkpoint, "--weights", which)
        for which in ("raw", "ema", "best")
    }
    assert found["raw"]["val/loss"] != found["ema"]["val/loss"]
    assert found["best"] == found["ema"]
    assert found["ema"]["weights"] == "ema"
    alone = evaluate(capsys, small_recipe, checkpoint.with_name("raw.ckpt"))
    assert (alone["weights"], alone["val/loss"]) == ("raw", found["raw"]["val/loss"])
    arguments = ["--config", str(small_recipe), "--weights", "ema"]
    assert program.main([*arguments, "--checkpoint", str(checkpoint.with_name("raw.ckpt"))]) == 2
    assert "holds no averaged weights" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_bad_data(
    small_recipe: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One changed byte: exit status 3, and the file's name."""
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    assert program.main(["--config", str(small_recipe), "--checkpoint", str(checkpoint)]) == 3
    assert str(checkpoint) in capsys.readouterr().err


def test_size_and_resize_are_the_recipes_keys(
    small_recipe: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--size keeps the proportion of crop to image; --resize states it; as the keys would."""
    keys = "data.val_size=16", "data.val_resize=24"
    assert evaluate(capsys, small_recipe, checkpoint, *keys) == evaluate(
        capsys, small_recipe, checkpoint, "--size", "16", "--resize", "24"
    )
    wide = "data.val_resize=12"  # two thirds
    kept = evaluate(capsys, small_recipe, checkpoint, wide, "--size", "16")
    assert kept == evaluate(capsys, small_recipe, checkpoint, *keys)
    assert kept != evaluate(capsys, small_recipe, checkpoint, wide)
    line = ["--config", str(small_recipe), "--checkpoint", str(checkpoint), "--resize", "4"]
    assert program.main(line) == 2
    assert "val_size at most val_resize" in capsys.readouterr().err


def test_flip_averages_the_logits_of_both_sides() -> None:
    """A network that looks at the left edge alone sees both; a symmetric one changes nothing."""
    images = torch.rand(2, 3, 4, 5)

    class Edge(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :, 0, 0]

    expected = (images[:, :, 0, 0] + images[:, :, 0, -1]) / 2
    assert torch.equal(program.Flipped(Edge())(images), expected)


def test_flip_reaches_the_metrics(
    small_recipe: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is another one, over the same images."""
    plain, flipped = (
        evaluate(capsys, small_recipe, checkpoint, *flag) for flag in ([], ["--flip"])
    )
    assert plain["val/loss"] != flipped["val/loss"]
    assert plain["val/seen"] == flipped["val/seen"] == 13


@pytest.mark.parametrize("devices", [1, 2])
def test_tables_add_up(small_recipe: Path, checkpoint: Path, tmp_path: Path, devices: int) -> None:
    """On one process and on two: every image is in one cell, the diagonal gives the accuracy."""
    done = run(
        "eval.py", "--config", small_recipe, "--checkpoint", checkpoint, "--json",
        "--tables", tmp_path / "tables", f"trainer.devices={devices}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    with (tmp_path / "tables" / "confusion.csv").open() as stream:
        head, *lines = csv.reader(stream)
    assert head == ["class", "a", "b", "c"]
    counts = [[int(value) for value in line[1:]] for line in lines]
    assert [sum(row) for row in counts] == [5, 4, 4]
    diagonal = [counts[i][i] for i in range(3)]
    assert sum(diagonal) / 13 == pytest.approx(facts["val/acc1"])
    with (tmp_path / "tables" / "per_class.csv").open() as stream:
        classes = list(csv.DictReader(stream))
    assert [row["class"] for row in classes] == ["a", "b", "c"]
    assert [round(float(row["acc1"]) * int(row["images"])) for row in classes] == diagonal
    assert {row["acc5"] for row in classes} == {"1.0000"}  # of three classes
    for label, row in enumerate(classes):
        wrong = dict(zip("abc", counts[label], strict=True)) | {"abc"[label]: 0}
        assert int(row["times"]) == max(wrong.values())
        assert wrong.get(row["mostly_taken_for"], 0) == int(row["times"])
    with Image.open(tmp_path / "tables" / "confusion.png") as picture:
        assert picture.width > 800


def test_confusions_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell that holds any has its number, where there are few classes."""
    plt = program._pyplot()
    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    for classes in (3, 30):
        matrix = ConfusionMatrix(classes)
        matrix.counts[0, 0], matrix.counts[0, 1], matrix.counts[2, 2] = 7, 1, 5
        program.write_tables(tmp_path, tuple(map(str, range(classes))), matrix, plt)
    few, many = (figure.axes[0].texts for figure in figures)
    assert {text.get_position(): text.get_text() for text in few} == {
        (0, 0): "7",
        (1, 0): "1",
        (2, 2): "5",
    }
    assert not many


def test_the_programs_share_their_model(small_recipe: Path, tmp_path: Path) -> None:
    """What train.py saves is what eval.py's model takes, name for name."""
    recipe = load_recipe(small_recipe)
    trained = build_model(recipe, build_data(recipe)).state_dict()
    assert trained.keys() == program.new_model(recipe, 3).state_dict().keys()
