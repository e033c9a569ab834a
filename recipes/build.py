"""What a recipe asks for, built: its data and its model."""

from collections.abc import Callable
from functools import partial

from loaders.datamodule import ImageNetData
from model.classifier import Classifier
from model.networks import build_network
from model.plateau import Plateau
from model.schedule import lr_at
from recipes.schema import Recipe


def build_data(recipe: Recipe) -> ImageNetData:
    """The recipe's data, opened."""
    return ImageNetData(
        recipe.data,
        seed=recipe.seed,
        batch_size=recipe.trainer.batch_size,
        accumulate=recipe.trainer.batches_per_step,
    )


def build_model(recipe: Recipe, data: ImageNetData) -> Classifier:
    """The recipe's model with new weights, for the data's classes and length of epoch."""
    return Classifier(
        build_network(recipe.model, len(data.train.classes)),
        classes=len(data.train.classes),
        optim=recipe.optim,
        loss=recipe.loss,
        lr_of=schedule_of(recipe, data.steps(recipe.trainer.global_batch)),
        mix=recipe.mix,
        plateau=Plateau(recipe.schedule) if recipe.schedule.name == "plateau" else None,
        seed=recipe.seed,
    )


def schedule_of(recipe: Recipe, epoch_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step; factors of it where it has to be found."""
    return partial(
        lr_at,
        config=recipe.schedule,
        peak_lr=recipe.optim.effective_lr(recipe.trainer.global_batch),
        epoch_steps=epoch_steps,
        epochs=recipe.trainer.epochs,
    )
