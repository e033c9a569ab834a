"""Going on with another number of processes, or of batches that make one optimizer step.

The global batch of a run stays. How many batches each process makes of its part may change, and
Lightning counts those batches: a checkpoint of behind step 2 of an epoch says

    8     where a step is made of 4 batches     | | | |S| | | |S| | | |S
    4     where it is made of 2                 | |S| |S| |S
"""

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

SPLIT = "split"
"""In a checkpoint: into how many processes and batches its run cut the global batch."""

_PROGRESS = "epoch_loop.batch_progress"


class UnfinishedStepError(ValueError):
    """Raised for a checkpoint that was written between the batches of one optimizer step."""


def batches_per_step(
    global_batch: int | None, *, batch_size: int, world: int, accumulate: int | None
) -> int:
    """PURE: batches that each process makes for one optimizer step.

    global_batch: samples of a step over all processes; None: what the others make. accumulate:
    what was asked for; None: nothing. Raises ValueError where a global batch cannot be made of
    such batches, with what would fit, or where it contradicts `accumulate`.
    """
    if global_batch is None:
        return accumulate or 1
    said = f"global_batch_size {global_batch} cannot be made"
    if global_batch % world:
        raise ValueError(
            f"{said} by {world} processes (devices x nodes), alike; "
            f"{_nearest(global_batch, world)} could"
        )
    if global_batch % (world * batch_size):
        raise ValueError(
            f"{said} of batch_size {batch_size} x {world} (devices x nodes); with a batch_size of "
            f"{_nearest(global_batch // world, batch_size)} it could"
        )
    batches = global_batch // (world * batch_size)
    if accumulate not in {None, batches}:
        raise ValueError(
            f"global_batch_size {global_batch} is not batch_size {batch_size} x {world} (devices x "
            f"nodes) x accumulate {accumulate}; leave accumulate out (accumulate=null): {batches}"
        )
    return batches


def _nearest(number: int, wanted: int) -> str:
    """What divides a number next below and above the one that was wanted, which does not."""
    divisors = [each for each in range(1, number + 1) if number % each == 0]
    near = [*[d for d in divisors if d < wanted][-1:], *[d for d in divisors if d > wanted][:1]]
    return " or ".join(map(str, near))


def converted(loops: Mapping[str, Any], *, before: int, now: int) -> dict[str, Any]:
    """PURE: the state of Lightning's loops, as a run with `now` batches a step would have it.

    before: batches a step of the run that wrote it. Of all that the loops count only training
    batches depend on that: the rest is in optimizer steps, epochs or, in the loader's own state,
    in samples; and a validation that was left is done anew. Raises UnfinishedStepError.
    """
    fit = dict(loops["fit_loop"])
    progress = fit[_PROGRESS]
    counts = {name: _converted(progress[name], before, now) for name in ("total", "current")}
    fit[_PROGRESS] = {**progress, **counts}
    return {**loops, "fit_loop": fit}


def _converted(counts: Mapping[str, int], before: int, now: int) -> dict[str, int]:
    """Batches of whole steps. The last one may not be `completed`: checkpoints are part of it."""
    steps, more = divmod(counts["ready"], before)
    if more:
        raise UnfinishedStepError(
            f"the checkpoint was written behind batch {more} of the {before} of an optimizer step; "
            f"resume it with {before} batches a step, or from another checkpoint"
        )
    return {name: steps * now - (counts["ready"] - count) for name, count in counts.items()}


def whole_steps(share: float, *, steps: int, accumulate: int) -> float:
    """PURE: the part of an epoch's batches to tell Lightning, so that whole steps come out.

    Lightning takes int(share * batches), which may be inside a step: a validation there would be
    of weights that no other number of batches a step ever has, and its checkpoint would lose
    gradients. So it is told int(share * steps) steps, at least one, and half a batch more, which
    rounding takes away.
    """
    taken = max(1, int(share * steps))
    return 1.0 if taken == steps else (taken * accumulate + 0.5) / (steps * accumulate)


class ElasticResume(lightning.Callback):
    """Writes into checkpoints how the global batch was cut, and converts those that it loads."""

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Add the number of processes and of batches a step."""
        checkpoint[SPLIT] = _split(trainer)

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Convert the loops' state, before Lightning takes it over.

        A checkpoint that says nothing was made with the same number. Raises UnfinishedStepError.
        """
        if trainer.state.fn != "fit":
            return
        now = _split(trainer)
        before = checkpoint.get(SPLIT, now)
        if before == now:
            return
        if before["accumulate"] != now["accumulate"]:
            checkpoint["loops"] = converted(
                checkpoint["loops"], before=before["accumulate"], now=now["accumulate"]
            )
        _say(
            f"each step is made of {_words(now)} batches (processes x batches of each), before the "
            f"checkpoint it was {_words(before)}"
        )

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Put right what Lightning's restart leaves behind.

        Callbacks that save by steps do not remember that this step was saved: they would save it
        again behind the next batch, inside the step that follows. And where the checkpoint is of
        an epoch's last batch, the epoch that follows would not be counted as begun: checkpoints of
        it, and of all behind it, would be taken for ones between epochs.
        """
        loop = trainer.fit_loop
        epochs = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.started == epochs.processed:  # type: ignore[attr-defined]
            loop.reset_restart_stage()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps:  # noqa: SLF001
                callback._last_global_step_saved = trainer.global_step  # noqa: SLF001


def _split(trainer: lightning.Trainer) -> dict[str, int]:
    return {"world": trainer.world_size, "accumulate": trainer.accumulate_grad_batches}


def _words(split: Mapping[str, int]) -> str:
    return f"{split['world']} x {split['accumulate']}"


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
