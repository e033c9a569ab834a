"""What a recipe asks for is what is built."""

from pathlib import Path

import torch

from model.plateau import Plateau
from recipes.build import build_data, build_model, schedule_of
from recipes.schema import load_recipe


def test_a_model_for_the_datas_classes(small_recipe: Path) -> None:
    """As many outputs as the data has classes, whatever the recipe's network had."""
    recipe = load_recipe(small_recipe)
    data = build_data(recipe)
    model = build_model(recipe, data).eval()
    logits = model.network(torch.zeros(2, 3, 8, 8))
    assert logits.shape == (2, len(data.train.classes))


def test_batches_of_the_recipe(small_recipe: Path) -> None:
    """The global batch decides the steps, and the schedule's peak follows it."""
    recipe = load_recipe(
        small_recipe,
        ["trainer.batch_size=4", "trainer.accumulate=2", "optim.lr=null", "optim.base_lr=3.2"],
    )
    data = build_data(recipe)
    assert recipe.trainer.global_batch == 8
    steps = data.steps(recipe.trainer.global_batch)
    assert steps == sum(data.train.counts) // 8
    lr_of = schedule_of(recipe, steps)
    assert max(map(lr_of, range(recipe.trainer.epochs * steps))) <= 3.2 * 8 / 256
    assert lr_of(steps) > lr_of(0) > 0  # one epoch of warm-up


def test_a_plateau_only_where_it_is_asked_for(small_recipe: Path) -> None:
    """The one schedule that needs to hear of validations."""
    recipe = load_recipe(small_recipe)
    assert not any(
        isinstance(v, Plateau) for v in vars(build_model(recipe, build_data(recipe))).values()
    )
    recipe = load_recipe(small_recipe, ["schedule.name=plateau"])
    model = build_model(recipe, build_data(recipe))
    assert any(isinstance(value, Plateau) for value in vars(model).values())
