#!/usr/bin/env python3
"""Train a recipe on packed shards; a run that was stopped goes on at the exact sample."""

import argparse
import os
import sys
from pathlib import Path

import lightning
from lightning.pytorch.utilities import rank_zero_only

from loaders.datamodule import ImageNetData
from loaders.decode import decoder_name
from model.classifier import Classifier, OtherNetworkError
from model.elastic import UnfinishedStepError
from model.guards import DivergedError
from model.hashes import BrokenCheckpointError
from model.liveness import last_word
from model.loggers import build_loggers
from model.lr_finder import NoRateError
from model.mirror import Mirror
from model.preemption import PreemptedError, exit_status
from model.published import Published
from model.sharing import DisagreementError, agree
from model.trainer import build_trainer
from recipes.build import build_data, build_model
from recipes.checks import exit_status as doctors_status
from recipes.doctor import examine, find_devices
from recipes.options import train_options
from recipes.rates import build_finder, plot_schedule
from recipes.record import RecipeRecord
from recipes.schema import Recipe, as_dict, load_recipe
from recipes.start import HELD_S, Start, forget, held, open_published, placeholder, start_of
from sharding.console import count
from sharding.errors import (
    EXIT_USAGE,
    DataError,
    UsageError,
    complain,
    outcome,
    reports_errors,
)
from sharding.store import atomic_file


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    options = train_options(__doc__, arguments)
    recipe = load_recipe(options.config, options.overrides)
    run = None if recipe.trainer.fast_dev_run else options.run or Path("runs") / recipe.name
    if run is not None and os.path.lexists(run) and not run.is_dir():
        raise UsageError(f"{run} is no folder; choose another (--run FOLDER)")
    if options.doctor:
        return _doctor(recipe, run, options.resume)
    if options.plot_lr is not None:
        _say(plot_schedule(recipe, options.plot_lr))
        return 0
    if run is None or options.find_lr or _rank():
        return _train(recipe, run, options)
    # A new run would be refused there in any case; one that goes on may follow its own end.
    with held(run, warn=_warn, wait_s=HELD_S if options.resume else 0):
        return _train(recipe, run, options)


def _train(recipe: Recipe, run: Path | None, options: argparse.Namespace) -> int:
    """Train in a folder that is ours, or in none; returns the exit status."""
    devices = find_devices(recipe)
    if devices.level == "error":
        raise UsageError(f"devices: {devices.text}")
    start, mirror = Start(None, ""), None
    if not options.find_lr:
        published = _published(recipe, run)
        start = _start(options.resume, run, published)
        if published is not None and _rank() == 0:
            mirror = Mirror(published, warn=_warn)

    lightning.seed_everything(recipe.seed, verbose=False)
    data = build_data(recipe)
    model = build_model(recipe, data)
    written = None if options.find_lr else run  # where the run itself is written
    more: list[lightning.Callback] = [RecipeRecord(as_dict(recipe), _warn, run=written)]
    if options.find_lr or recipe.optim.finds_lr:
        more.insert(0, build_finder(recipe, data, run, train=not options.find_lr, say=_say))
    trainer = build_trainer(
        recipe.trainer,
        atomic_file=atomic_file,
        run=written,
        title=recipe.model.name,
        val_samples=sum(data.val.counts),
        epoch_steps=data.steps(recipe.trainer.global_batch),
        loggers=build_loggers(recipe.logging, written, name=recipe.name, facts=as_dict(recipe)),
        keys_of=lambda numbers: [data.train.key(number) for number in numbers],
        more=more,
        mirror=mirror,
        outcome=_outcome,
        complain=complain,
    )
    checkpoint = agree(trainer, start.path, name=placeholder(run))
    where = start.where or "another rank"
    _say(
        f"{_headline(recipe, data)}, "
        + (f"resuming from {where}" if checkpoint else "from scratch")
    )
    status = _fit(trainer, model, data, checkpoint)
    if status is not None:
        return status
    if checkpoint and not trainer.callback_metrics and not recipe.trainer.fast_dev_run:
        _say(
            f"nothing to do: {where} is of step {trainer.global_step}, and the run ends after "
            f"{count(recipe.trainer.epochs, 'epoch')}; --epochs N goes further"
        )
    complaint = recipe.expected.complaint(trainer.callback_metrics)
    if complaint is not None and not recipe.trainer.cuts:
        _warn(complaint)
    return 0


def _headline(recipe: Recipe, data: ImageNetData) -> str:
    """What is trained, on what, for how long and how."""
    batch = recipe.trainer.global_batch
    rate = "to be found" if recipe.optim.finds_lr else f"{recipe.optim.effective_lr(batch):g}"
    return ", ".join(
        [
            f"{recipe.name}: {recipe.model.name}",
            f"{sum(data.train.counts)} training and {sum(data.val.counts)} validation images",
            count(len(data.train.classes), "class"),
            f"{count(recipe.trainer.epochs, 'epoch')} of {count(data.steps(batch), 'step')}",
            *(f"shortened by trainer.{cut}" for cut in recipe.trainer.cuts),
            f"global batch {batch}",
            f"peak learning rate {rate}",
            decoder_name(recipe.data.decoder),
        ]
    )


def _fit(
    trainer: lightning.Trainer, model: Classifier, data: ImageNetData, checkpoint: Path | None
) -> int | None:
    """Train; returns the exit status of a run that did not come to its end and has said why."""
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except PreemptedError as error:
        _say(str(error))
        return exit_status(trainer.global_rank)
    except (
        DivergedError,
        NoRateError,
        DisagreementError,
    ) as error:  # on all ranks; the first one's status counts
        _complain(f"{Path(sys.argv[0]).name}: error: {error}")
        status = 1 if isinstance(error, DivergedError) else EXIT_USAGE
        return status if exit_status(trainer.global_rank) else 0
    except Exception as error:
        told = last_word(trainer)
        if told is not None:
            return told
        named = _named(error)
        if named is not error:
            raise named from error
        raise
    finally:
        forget()
    return None


def _outcome(error: BaseException) -> tuple[int, str] | None:
    """Exit status and line of an error in `fit` that a user is meant to see."""
    return outcome(_named(error))


def _named(error: BaseException) -> BaseException:
    """A checkpoint's error as one that says whose fault it is."""
    if isinstance(error, BrokenCheckpointError):
        return DataError(str(error))
    ours = isinstance(error, UnfinishedStepError | OtherNetworkError)
    return UsageError(str(error)) if ours else error


def _doctor(recipe: Recipe, run: Path | None, resume: str | None) -> int:
    """Print what the run would meet on this node; 2 or 3 where something would stop it."""
    found = []

    def checkpoint() -> Path | None:
        return _start(resume, run, _published(recipe, run)).path

    for finding in examine(recipe, run, checkpoint=checkpoint):
        print(finding, flush=True)
        found.append(finding)
    return doctors_status(found)


def _published(recipe: Recipe, run: Path | None) -> Published | None:
    """Where the recipe has checkpoints published, for a run that writes any."""
    url = recipe.trainer.checkpoint_url
    return None if url is None or run is None else open_published(url)


def _start(resume: str | None, run: Path | None, published: Published | None) -> Start:
    return start_of(resume, run, published, rank=_rank(), warn=_warn)


def _rank() -> int:
    """Of this process, as far as the environment tells: Lightning's own first one is 0, too."""
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank


def _warn(text: str) -> None:
    _complain(f"warning: {text}")


@rank_zero_only
def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
