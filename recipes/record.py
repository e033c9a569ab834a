"""The recipe beside and in the checkpoint: a run that goes on with another is told what differs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import yaml

from sharding.store import atomic_file

# Sections and keys that decide what the weights become. What may differ for other reasons, like
# the number of devices, is not here; the data set, seed and global batch are refused elsewhere.
DECISIVE = (
    "model.name",
    "model.width",
    "model.small_stem",
    "model.blurpool",
    "model.drop_path",
    "model.dropout",
    "model.sync_bn",
    "optim",
    "schedule",
    "loss",
    "mix",
    "data.augment",
    "data.train_size",
    "data.progressive",
    "data.val_resize",
    "data.val_size",
    "data.val_interpolation",
    "trainer.epochs",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.ema_decay",
    "trainer.ema_every_n_steps",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
)
RECIPE = "recipe"
"""Its key in the checkpoint."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """PURE: what differs of two resolved recipes and decides the weights, like 'optim.lr 1 -> 2'.

    Keys that only one of them has (another version wrote it) do not count.
    """
    old, new = _flat(before), _flat(now)
    return [
        f"{key} {_shown(old[key])} -> {_shown(new[key])}"
        for key in new
        if key in old
        and _shown(old[key]) != _shown(new[key])
        and any(key == start or key.startswith(f"{start}.") for start in DECISIVE)
    ]


class RecipeRecord(lightning.Callback):
    """Puts the resolved recipe into each checkpoint; warns where a resumed run's differs.

    A run that trains also has it in its folder; one that is refused, or had ended, leaves the file
    alone.
    """

    def __init__(
        self, recipe: Mapping[str, Any], warn: Callable[[str], None], *, run: Path | None = None
    ) -> None:
        """recipe: plain values, by section and key. run: the run's folder; None: there is none."""
        self._recipe = dict(recipe)
        self._warn = warn
        self._run = run

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Leave it in the run's folder."""
        if self._run is not None and trainer.is_global_zero:
            with atomic_file(self._run / "recipe.yaml") as stream:
                stream.write(yaml.safe_dump(self._recipe, sort_keys=False).encode())

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Write it down."""
        checkpoint[RECIPE] = self._recipe

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Compare."""
        found = differences(checkpoint.get(RECIPE, {}), self._recipe)
        if found:
            self._warn(
                f"the checkpoint was made with another recipe: {', '.join(found)}; the run goes on "
                "with the new values"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    """As YAML has it: a tuple is a list, and 1 is not 1.0's difference."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, float):
        return format(value, "g")
    return "null" if value is None else str(value)
