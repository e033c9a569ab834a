"""The recipes that ship: headed, building all that they name, and the published values in them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.schedule import lr_at
from model.trainer import build_trainer
from recipes.build import build_data, build_model
from recipes.schema import Recipe, load_recipe
from sharding.store import atomic_file

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
FFCV = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}
NAMES = {
    "base", "demo", "tiny", "local", "full", "single_gpu_full", "resnet_strikes_back",
    "lr_finder_step_100", "torchvision_v1", "torchvision_v2", "rsb_a1", "rsb_a2", "rsb_a3",
    "nvidia_90", "mosaic_mild", "cifar10", "imagenette", *(f"ffcv_{epochs}" for epochs in FFCV),
}  # fmt: skip


def options(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a recipe with its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            found |= options(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def recipe(name: str, *overrides: str) -> Recipe:
    """A recipe that ships."""
    return load_recipe(FOLDER / f"{name}.yaml", overrides)


def effective_lr(name: str, devices: int) -> float:
    """The rate on as many devices as the recipe's command names."""
    found = recipe(name, f"trainer.devices={devices}")
    return found.optim.effective_lr(found.trainer.global_batch)


def test_all_recipes_are_there() -> None:
    """The files are those that the documentation names."""
    assert {path.stem for path in RECIPES} == NAMES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_header_says_what_to_expect(path: Path) -> None:
    """Accuracy, source where it is another's, and whether it was run here."""
    head = path.read_text().split("\n\nbase: ")[0]
    assert "# Command:" in head
    assert "# Hardware:" in head
    assert "# Expected:" in head or path.stem == "demo"
    others = path.stem not in {"demo", "tiny", "local", "cifar10"}
    assert ("# Source:" in head) == others or path.stem == "cifar10"
    words = " ".join(head.replace("#", "").split())
    assert ("not run here" in words.lower()) == (others or path.stem == "local")
    assert all(len(line) <= 100 for line in path.read_text().splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_takes_two_steps(path: Path, small_shards: Path) -> None:
    """Its network, optimizer, schedule, loss, mixing, averaging and loader, on tiny images."""
    overrides = [
        f"data.root={small_shards}", "data.num_workers=0", "data.train_size=32",
        "data.val_size=32", "data.val_resize=32", "trainer.accelerator=cpu", "trainer.devices=1",
        "trainer.batch_size=12", "trainer.epochs=1", "trainer.limit_train_batches=0.5",
    ]  # fmt: skip
    named = load_recipe(path)
    if named.data.progressive.start_size:
        overrides.append("data.progressive.start_size=24")
    if named.trainer.precision == "16-mixed":
        overrides.append("trainer.precision=32-true")  # fp16 is for GPUs
    if named.optim.finds_lr:
        overrides.append("optim.lr=0.05")
    tried = load_recipe(path, overrides)
    torch.manual_seed(tried.seed)
    data = build_data(tried)
    model = build_model(tried, data)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    trainer = build_trainer(tried.trainer, atomic_file=atomic_file, run=None, val_samples=13)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2
    after = model.network.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert any("weight" in name for name in changed)
    metrics = trainer.callback_metrics
    assert metrics["val/seen"] == 13
    assert ("val_ema/acc1" in metrics) == (named.trainer.ema_decay > 0)


@pytest.mark.parametrize(
    ("name", "devices", "batch", "rate"),
    [
        ("torchvision_v1", 8, 256, 0.1),
        ("torchvision_v2", 8, 1024, 0.5),
        ("rsb_a1", 8, 2040, 5e-3 * 2040 / 2048),
        ("rsb_a2", 8, 2040, 5e-3 * 2040 / 2048),
        ("rsb_a3", 8, 2048, 8e-3),
        ("nvidia_90", 8, 2048, 2.048),
        ("mosaic_mild", 8, 2048, 2.048),
        *((f"ffcv_{epochs}", 8, 4096, 1.7) for epochs in FFCV),
        ("single_gpu_full", 1, 128, 0.25),
        ("resnet_strikes_back", 1, 256, 0.5),
        ("base", 8, 256, 0.1),
    ],
)
def test_rates_are_the_published_ones_at_the_published_batch(
    name: str, devices: int, batch: int, rate: float
) -> None:
    """On as many devices as the command names."""
    assert recipe(name, f"trainer.devices={devices}").trainer.global_batch == batch
    assert effective_lr(name, devices) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "epochs", "facts"),
    [
        ("torchvision_v1", 90, {"policy": "none", "ema_decay": 0.0, "val_resize": 256}),
        ("torchvision_v2", 600, {"policy": "trivialaugment", "repeats": 4, "val_resize": 232}),
        ("rsb_a1", 600, {"repeats": 3, "drop_path": 0.05, "bce_threshold": 0.2}),
        ("rsb_a2", 300, {"repeats": 3, "drop_path": 0.05, "mixup_alpha": 0.1}),
        ("rsb_a3", 100, {"repeats": 1, "drop_path": 0.0, "train_size": 160}),
        ("nvidia_90", 90, {"norm_weight_decay": False, "momentum": 0.875}),
        ("mosaic_mild", 36, {"blurpool": True, "train_size": 176, "bce_sum": True}),
        ("full", 90, {"policy": "autoaugment", "num_workers": 12, "mixup_alpha": 0.2}),
        ("single_gpu_full", 100, {"precision": "16-mixed", "weight_decay": 2e-5}),
        ("resnet_strikes_back", 600, {"cutmix_alpha": 1.0, "label_smoothing": 0.1}),
        ("lr_finder_step_100", 100, {"gradient_clip_val": 1.0, "step_epochs": 30, "lr": "auto"}),
        ("local", 10, {"batch_size": 128, "lr": 0.05, "ema_decay": 0.0}),
    ],
)
def test_inherited_values_are_those_that_are_meant(
    name: str, epochs: int, facts: dict[str, Any]
) -> None:
    """What a recipe takes from its base is looked at where it matters."""
    found = recipe(name)
    assert found.trainer.epochs == epochs
    sections = (
        found.data, found.data.augment, found.model, found.optim, found.schedule, found.loss,
        found.mix, found.trainer,
    )  # fmt: skip
    for key, value in facts.items():
        assert [getattr(s, key) for s in sections if hasattr(s, key)] == [value], key


@pytest.mark.parametrize(("epochs", "ramp"), FFCV.items())
def test_ffcv_ends_at_zero_and_grows_in_time(epochs: int, ramp: tuple[int, int]) -> None:
    """Peak at epoch 2, zero at the end, 160 pixels until the ramp and 192 behind it."""
    found = recipe(f"ffcv_{epochs}")
    progressive = found.data.progressive
    assert (found.trainer.epochs, found.data.train_size) == (epochs, 192)
    assert (progressive.start_size, progressive.start_epoch, progressive.end_epoch) == (160, *ramp)
    rates = [
        lr_at(step, config=found.schedule, peak_lr=1.7, epoch_steps=10, epochs=epochs)
        for step in range(epochs * 10 + 1)
    ]
    assert rates[20] == max(rates) == 1.7
    assert rates[-1] == 0 < rates[-2]
    assert found.expected.accuracy_max is not None


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_band_holds_the_published_figure(path: Path) -> None:
    """Where a header states an accuracy of others, the band that training warns by holds it."""
    band = load_recipe(path).expected
    text = path.read_text().split("# Expected:")[-1].split()
    if band.accuracy_min is None or band.accuracy_max is None:
        return
    assert band.accuracy_min <= float(text[0].rstrip(";,")) / 100 <= band.accuracy_max


def test_every_option_is_documented_with_its_default() -> None:
    """docs/02_model.md has a row for each key; a default that was changed is changed there."""
    text = (FOLDER.parent / "docs" / "02_model.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", text, re.MULTILINE))
    for key, value in options(Recipe()).items():
        assert key in rows, key
        shown = yaml.safe_load(rows[key])
        if isinstance(value, tuple | list):
            assert shown == pytest.approx(list(value), rel=1e-3), key
        elif isinstance(value, float):
            assert float(shown) == pytest.approx(value, rel=1e-3), key
        else:
            assert shown == value, key


def test_every_recipe_is_documented() -> None:
    """docs/02_model.md names each; the ffcv recipes by their epochs."""
    text = (FOLDER.parent / "docs" / "02_model.md").read_text()
    for name in NAMES:
        assert f"`{name}`" in text or f"`{name.removeprefix('ffcv_')}`" in text, name
