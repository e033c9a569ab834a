"""recipes/schema.py: inheritance, strict keys, types, overrides; and every recipe that ships."""

from pathlib import Path

import pytest
import yaml

from model.networks import build_network
from model.schedule import lr_at
from recipes.schema import as_dict, load_recipe
from sharding.errors import UsageError

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def write(folder: Path, **files: str) -> Path:
    """Write recipes by name; returns the first one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_builds(path: Path) -> None:
    """It has its file's name, its network can be built, its schedule gives rates."""
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    build_network(recipe.model, 10)
    for step in range(2):
        rate = lr_at(
            step, config=recipe.schedule, peak_lr=1, epoch_steps=9, epochs=recipe.trainer.epochs
        )
        assert 0 <= rate <= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_headed_by_command_and_hardware(path: Path) -> None:
    """The first lines say how to run it and on what."""
    head = path.read_text().split("\n\n")[0]
    assert "# Command:" in head
    assert "# Hardware:" in head


def test_a_child_overrides_its_parents_and_the_command_line_all(tmp_path: Path) -> None:
    """Values are merged key by key, the eldest first."""
    path = write(
        tmp_path,
        child="base: parent.yaml\ntrainer:\n  epochs: 3",
        parent="base: grand.yaml\ntrainer: {epochs: 2, batch_size: 7}\noptim: {lr: 1.e-3}",
        grand="name: grand\ntrainer: {epochs: 1, devices: 4}",
    )
    recipe = load_recipe(path, ["trainer.devices=2", "data.augment.crop_scale=[0.5, 0.9]"])
    assert (recipe.trainer.epochs, recipe.trainer.batch_size, recipe.trainer.devices) == (3, 7, 2)
    assert (recipe.name, recipe.optim.lr) == ("grand", 1e-3)
    assert recipe.data.augment.crop_scale == (0.5, 0.9)


def test_a_resolved_recipe_can_be_read_again(tmp_path: Path) -> None:
    """What a run leaves in its folder gives the same recipe."""
    recipe = load_recipe(RECIPES[0])
    path = write(tmp_path, again=yaml.safe_dump(as_dict(recipe)))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {epoch: 3}", "unknown key trainer.epoch; did you mean trainer.epochs?"),
        ("data: {augment: {flip: 1}}", "unknown key data.augment.flip"),
        ("mixup: 0.2", "unknown key mixup"),
        ("trainer: {epochs: many}", "trainer.epochs must be an integer, got 'many'"),
        ("trainer: {epochs: 1.5}", "trainer.epochs must be an integer, got 1.5"),
        ("trainer: {ema_decay: {a: 1}}", "trainer.ema_decay must be a number, got {'a': 1}"),
        ("trainer: {fast_dev_run: maybe}", "fast_dev_run must be true or false, got 'maybe'"),
        ("trainer: {checkpoint_every_minutes: x}", "every_minutes must be a number, got 'x'"),
        ("model: {name: }", "model.name must be text, got nothing"),
        (
            "schedule: {points: [[0, one]]}",
            "points must be a list of lists of numbers, got .*'one'",
        ),
        (
            "data: {augment: {crop_scale: big}}",
            "data.augment.crop_scale must be a list of 2 numbers, got 'big'",
        ),
        ("data: {augment: {crop_scale: [0.1]}}", r"must be a list of 2 numbers, got \[0.1\]"),
        ("data: {augment: {crop_scale: {a: 1}}}", "must be a list of 2 numbers, got {'a': 1}"),
        ("optim: {lr: [1]}", r"optim.lr must be an integer or a number or text, got \[1\]"),
        ("trainer: {epochs: '${oops:1}'}", "trainer: Unsupported interpolation type oops"),
        ("trainer: {lr: 3}", "unknown key trainer.lr; did you mean optim.lr?"),
        ("flip_probability: 1", "unknown key flip_prob.*; did you mean data.augment.flip_prob"),
        ("epochs: 3", "unknown key epochs; did you mean trainer.epochs?"),
        ("batch_size: 3", "unknown key batch_size; did you mean trainer.batch_size?"),
        ("sed: 3", "unknown key sed; did you mean seed?"),
        ("trainer: {epochs: 0}", "epochs must be at least 1, got 0"),
        ("trainer: {precision: 16}", "precision must be one of"),
        ("trainer: 5", "trainer is a section, it cannot be 5"),
        ("optim: {lr: -1}", "lr must be at least 0, got -1"),
        ("optim: {lr: a lot}", "lr must be a number, auto or null, got 'a lot'"),
        ("schedule: {points: [[0, 1], [0, 2]]}", "rising epochs"),
        ("model: {name: resnet49}", "got 'resnet49', near: resnet"),
        ("expected: {accuracy_min: 76.1}", "must be in 0..1"),
        ("data: {format: tar}", "format must be one of shards, imagefolder, got 'tar'"),
        ("seed: -1", "seed must be in"),
        ("base: nowhere.yaml", "there is no recipe .*nowhere.yaml"),
        ("base: cifar.yaml", "no recipe .*cifar.yaml; did you mean .*recipes/cifar10.yaml"),
        ("base: recipe.yaml", "each other's base"),
        ("- a list", "is no recipe"),
        ("a: [", "is no YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "is no YAML"),  # never run
    ],
)
def test_a_bad_recipe_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    """The error names file, key and value, and what was meant where that is near."""
    path = write(tmp_path, recipe=text)
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epochs", "is no override; write section.key=value"),
        ("trainer.epochz=1", "did you mean trainer.epochs?"),
        ("trainer.epochs=[", "the value is no YAML"),
        ("trainer.epochs=null", "trainer.epochs=null: trainer.epochs must be an integer, got noth"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    """The error quotes what was typed."""
    with pytest.raises(UsageError, match=message):
        load_recipe(RECIPES[0], [override])


SIZES = "data: {val_size: 40, val_resize: 32, train_size: 32}\n"
"""Do not fit before the child's."""


@pytest.mark.parametrize(
    ("parent", "child", "overrides", "message"),
    [
        ("", "", ["trainer.epochs=0", "optim.lr=0.1"], "^trainer.epochs=0: trainer: epochs must"),
        ("", "", ["trainer.epochs=0", "trainer.epochs=-1"], "^trainer.epochs=-1: trainer: epochs"),
        ("", "", ["optim.lr=0.1", "seed=-1"], "^seed=-1: seed must be in"),
        (
            "",
            "",
            ["data.augment.crop_scale=[1, 0]"],
            r"^data.augment.crop_scale=.*: data.augment: ",
        ),
        (SIZES, "", ["data.val_size=640", "seed=3"], "^data.val_size=640: data: sizes must be"),
        (SIZES, "trainer: {epochs: -2}", ["seed=3"], "child.yaml: trainer: epochs must .* got -2$"),
        (f"{SIZES}seed: -1", "", ["seed=-1"], "parent.yaml: seed must be in"),
        (
            "trainer: {precision: foo}",
            "trainer: {epochs: 0}",
            ["trainer.epochs=3"],
            "parent.yaml: trainer: precision must be one of",
        ),
        (
            "",
            "",
            ["data.root=${trainer.nope}"],
            "^data.root=.*: data: Interpolation key 'trainer.n",
        ),
        ("", "", ["seed=${oc.env:NOT_THERE}"], "^seed=.*Environment variable 'NOT_THERE' not f"),
    ],
)
def test_who_made_a_value_bad_is_blamed(
    tmp_path: Path, parent: str, child: str, overrides: list[str], message: str
) -> None:
    """The source with which the section went bad, be it a recipe, its parent or an override."""
    child = f"base: parent.yaml\ndata: {{val_resize: 480}}\n{child}"
    path = write(tmp_path, child=child, parent=f"name: parent\n{parent}")
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
