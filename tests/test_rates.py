"""Learning rates: found, trained with, and drawn, as a user asks for them."""

import json
from pathlib import Path

import pytest
import torch

import train as train_program
from tests.runs import one_line, run


def test_a_rate_is_found_and_the_run_is_what_it_would_be_with_it(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--find_lr leaves a picture and JSON; lr: auto finds the same, and trains with it."""
    common = ["--config", str(small_recipe), "lr_finder.steps=20", "lr_finder.lr_max=1.0"]
    only = tmp_path / "only"
    assert train_program.main([*common, "--run", str(only), "--find_lr"]) == 0
    assert {path.name for path in only.iterdir()} == {"lr_finder.json", "lr_finder_plot.png"}
    rate = json.loads((only / "lr_finder.json").read_text())["suggestion"]
    assert capsys.readouterr().out.endswith(
        f"learning rate found: {rate:.6g} ({only}/lr_finder_plot.png); "
        f"to train with it: --lr {rate:.3g}\n"
    )

    weights = []
    for name, value in (("auto", "auto"), ("stated", repr(rate))):
        folder = tmp_path / name
        assert train_program.main([*common, "--run", str(folder), "--lr", value]) == 0
        last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(last["state_dict"])
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    found = json.loads((tmp_path / "auto" / "lr_finder.json").read_text())
    assert found["suggestion"] == rate

    # Resumed, the checkpoint's rate is taken: nothing is looked for again.
    (tmp_path / "auto" / "lr_finder.json").unlink()
    again = [*common, "--run", str(tmp_path / "auto"), "--lr", "auto", "--resume", "auto"]
    assert train_program.main([*again, "--epochs", "3"]) == 0
    assert not (tmp_path / "auto" / "lr_finder.json").exists()
    last = torch.load(tmp_path / "auto" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["rate"]["scale"] == rate


def test_two_processes_find_the_same_rate_and_average_weights(
    small_recipe: Path, tmp_path: Path
) -> None:
    """lr: auto, an average, mixing and accumulation, over DDP; each has its best checkpoint."""
    done = run(
        "train.py", "--config", small_recipe, "--run", tmp_path / "run", "--devices", 2,
        "--batch_size", 2, "--lr", "auto", "trainer.accumulate=2", "trainer.ema_decay=0.9",
        "mix.mixup_alpha=0.2", "mix.cutmix_alpha=1", "lr_finder.steps=15", "lr_finder.lr_max=0.3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learning rate found") == 1
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")]
    assert any("-val_acc1=" in name for name in names)
    assert any("-val_ema_acc1=" in name for name in names)
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 12
    assert last["rate"]["scale"] > 0
    differ = [
        name
        for name, value in last["current_model_state"].items()
        if not torch.equal(value, last["state_dict"][name])
    ]
    assert "network.fc.weight" in differ


def test_the_schedule_is_drawn(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--plot_lr writes a picture, says of what, and trains nothing."""
    path = tmp_path / "lr.png"
    arguments = ["--config", str(small_recipe), "--run", str(tmp_path / "run")]
    assert train_program.main([*arguments, "--plot_lr", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: cosine, 2 epochs of 6 steps\n"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_without_a_rate_that_helps_there_is_no_run(
    small_recipe: Path, tmp_path: Path, devices: int
) -> None:
    """Rates too high for anything: one line that says what to set."""
    done = run(
        "train.py", "--config", small_recipe, "--run", tmp_path / "run", "--devices", devices,
        "--batch_size", 8 // devices, "--lr", "auto", "lr_finder.lr_min=1e+30",
        "lr_finder.lr_max=1e+31", "lr_finder.steps=10",
    )  # fmt: skip
    assert done.returncode == 2
    assert "made the loss fall; set optim.lr" in one_line(done.stderr)
