"""recipes/record.py: which values decide a run, and what is said where they differ."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.record import DECISIVE, RecipeRecord, differences
from recipes.schema import Recipe, as_dict, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def resolved(*overrides: str) -> dict[str, Any]:
    """A recipe's values."""
    return as_dict(load_recipe(RECIPES / "base.yaml", overrides))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr=0.2", ["optim.lr null -> 0.2"]),
        ("schedule.points=[[0, 1]]", ["schedule.points [] -> [[0, 1]]"]),
        ("data.augment.flip_probability=0", ["data.augment.flip_probability 0.5 -> 0"]),
        ("trainer.epochs=91", ["trainer.epochs 90 -> 91"]),
        ("trainer.devices=4", []),
        ("trainer.batch_size=64", []),
        ("data.root=elsewhere", []),
        ("data.num_workers=3", []),
        ("logging.wandb=true", []),
        ("trainer.checkpoint_url=s3://b/c", []),
        ("name=other", []),
        ("model.compile=true", []),
    ],
)
def test_only_what_decides_the_weights_differs(override: str, said: list[str]) -> None:
    """Key, old and new value."""
    assert differences(resolved(), resolved(override)) == said


def test_every_decisive_key_is_one() -> None:
    """A key that was renamed is renamed here as well."""
    for key in DECISIVE:
        values: Any = as_dict(Recipe())
        for part in key.split("."):
            assert part in values, key
            values = values[part]


def test_other_versions_recipes() -> None:
    """What one of the two does not know, and how it was written, is no difference."""
    now = resolved()
    before = resolved()
    del before["optim"]["nesterov"]
    before["optim"]["gone"] = 1
    before["optim"]["momentum"] = float(now["optim"]["momentum"])
    before["data"]["augment"]["crop_scale"] = list(now["data"]["augment"]["crop_scale"])
    assert differences(before, now) == []
    assert differences({}, now) == []


def test_it_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """Loaded as plain values; one warning that names all."""
    told: list[str] = []
    checkpoint: dict[str, Any] = {}
    trainer: Any = None
    RecipeRecord(resolved(), told.append).on_save_checkpoint(trainer, trainer, checkpoint)
    torch.save(checkpoint, tmp_path / "a")
    loaded = torch.load(tmp_path / "a", weights_only=True)
    RecipeRecord(resolved(), told.append).on_load_checkpoint(trainer, trainer, loaded)
    assert told == []
    other = resolved("optim.momentum=0.8", "loss.name=bce")
    RecipeRecord(other, told.append).on_load_checkpoint(trainer, trainer, loaded)
    (line,) = told
    assert "another recipe: optim.momentum 0.9 -> 0.8, loss.name cross_entropy -> bce;" in line
    RecipeRecord(other, told.append).on_load_checkpoint(trainer, trainer, {})  # an older one
    assert len(told) == 1
