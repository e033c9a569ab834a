"""model/elastic.py: runs whose steps are cut anew when they go on, here and killed for real."""

import json
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train as train_program
from loaders.sizes import ProgressiveConfig
from model.checkpoint import AtomicCheckpointIO
from model.elastic import UnfinishedStepError, converted, whole_steps
from model.newest import newest_whole
from tests.witness import STEPS, Witness, fit

PIECES = (1, 2, 4)  # batches that a step of 8 samples is cut into
TOLERANCE = 1e-5
"""By how much weights of 12 to 160 steps, of which the largest is about 0.5, may differ where the
same gradients are added up in another order; they have 24 bits."""

GROWING = ProgressiveConfig(start_size=12, end_epoch=1)

steps, batches = st.integers(1, 500), st.integers(1, 64)


def cut(pieces: int) -> dict[str, Any]:
    """Steps of 8 samples in so many batches, as a user asks for them."""
    return {"batch_size": 8 // pieces, "global_batch_size": 8}


@given(steps, batches, st.floats(0, 1, exclude_min=True))
def test_parts_of_an_epoch_end_with_a_step(total: int, accumulate: int, share: float) -> None:
    """Lightning's own formula gives whole steps, and as many however they are cut."""
    told = whole_steps(share, steps=total, accumulate=accumulate)
    assert 0 < told <= 1
    assert int(total * accumulate * told) == max(1, int(share * total)) * accumulate


def loops(total: int, current: int, completed: int) -> dict[str, Any]:
    """What Lightning saves of its loops, as far as it matters."""

    def counts(ready: int) -> dict[str, int]:
        return {"ready": ready, "started": ready, "processed": ready, "completed": completed}

    progress = {"total": counts(total), "current": counts(current), "is_last_batch": False}
    fit_loop = {"epoch_loop.batch_progress": progress, "epoch_progress": {"current": 3}}
    return {"fit_loop": fit_loop, "validate_loop": {"state_dict": {}}}


@given(steps, steps, st.integers(0, 1), batches, batches)
def test_there_and_back_changes_nothing(
    total: int, current: int, open_batches: int, before: int, now: int
) -> None:
    """Converted twice, a state is what it was; the one that was given stays as it is."""
    given_ = loops(total * before, current * before, total * before - open_batches)
    kept = json.dumps(given_)
    there = converted(given_, before=before, now=now)
    assert there["fit_loop"]["epoch_loop.batch_progress"]["total"] == {
        "ready": total * now,
        "started": total * now,
        "processed": total * now,
        "completed": total * now - open_batches,
    }
    assert converted(there, before=now, now=before) == given_
    assert json.dumps(given_) == kept


def test_a_checkpoint_inside_a_step_is_refused() -> None:
    """Its gradients are lost; the error, of status 2, says where it is and what can be done."""
    expected = r"behind batch 2 of the 3 .* with 3 batches a"
    with pytest.raises(UnfinishedStepError, match=expected) as caught:
        converted(loops(11, 5, 11), before=3, now=1)
    assert train_program._outcome(caught.value) == (2, str(caught.value))


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the training loop, without the batches of its validations."""
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    loops: dict[str, Any] = state["loops"]
    return loops


@pytest.mark.parametrize("interval", [0.34, pytest.param(1.0, marks=pytest.mark.slow)])
def test_converted_counters_are_those_of_a_run_of_that_kind(
    small_shards: Path, tmp_path: Path, interval: float
) -> None:
    """Behind each step and validation of two epochs, from every cut into every other."""
    for pieces in PIECES:
        (tmp_path / str(pieces)).mkdir()
        fit(small_shards, save=tmp_path / str(pieces), val_check_interval=interval, **cut(pieces))
    names = sorted(path.name for path in (tmp_path / "1").glob("*.ckpt"))
    assert len(names) == 2 * STEPS + (2 if interval == 1 else 6)
    for name in names:
        states = {pieces: state_of(tmp_path / str(pieces) / name) for pieces in PIECES}
        for before, now in permutations(PIECES, 2):
            there = converted(states[before], before=before, now=now)
            assert there == states[now], (before, now, name)


def by_step(witness: Witness) -> dict[tuple[int, int], list[int]]:
    """Samples of each (epoch, step), in the order of the global batch."""
    found: dict[tuple[int, int], list[int]] = {}
    for epoch, step, numbers in witness.seen:
        found.setdefault((epoch, step), []).extend(numbers)
    return found


def at_step(run: Path) -> int:
    """Where a run goes on."""
    found = newest_whole(run / "checkpoints")
    assert not found.broken
    return 0 if found.taken is None else found.taken.step


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Weights that differ by rounding alone; returns by how much."""
    assert ours.keys() == theirs.keys()
    most = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert most <= TOLERANCE
    return most


@pytest.mark.parametrize(
    ("before", "now", "every", "options"),
    [
        (1, 4, 5, {}),
        (4, 1, 6, {"workers": 2, "val_check_interval": 0.34}),
        (2, 4, 5, {"limit_train_batches": 0.9, "val_check_interval": 0.4, "ema_decay": 0.8}),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                (1, 8, 1, {}),
                (8, 1, 1, {"workers": 2}),
                (2, 4, 1, {"val_check_interval": 0.34}),
                (4, 2, 1, {"val_check_interval": 0.5, "workers": 1}),
                (4, 1, 1, {"ema_decay": 0.8, "ema_every_n_steps": 2}),
                (8, 2, 1, {"data_options": {"progressive": GROWING}}),
            ]
        ),
    ],
    ids=str,
)
def test_resumed_in_other_pieces(
    small_shards: Path, tmp_path: Path, before: int, now: int, every: int, options: dict[str, Any]
) -> None:
    """The samples, rates and validations of each step that is left, and the weights in the end."""
    options = {"norm": False, **options}
    undisturbed, weights = fit(small_shards, save=tmp_path, **cut(before), **options)
    samples, checkpoints = by_step(undisturbed), sorted(tmp_path.glob("*.ckpt"))
    epoch_end = tmp_path / f"{sum(epoch == 0 for epoch, _ in samples):02}-step.ckpt"
    for checkpoint in {epoch_end, *checkpoints[::-every]}:
        step = int(checkpoint.name[:2])
        again = tmp_path / checkpoint.stem
        again.mkdir()
        resumed, end = fit(small_shards, resume=checkpoint, save=again, **cut(now), **options)
        assert by_step(resumed) == {key: samples[key] for key in samples if key[1] >= step}
        for later in again.glob("*.ckpt"):  # one can go on from these as well
            if int(later.name[:2]) > step:
                theirs = converted(state_of(tmp_path / later.name), before=before, now=now)
                assert state_of(later) == theirs, (checkpoint.name, later.name)
        assert resumed.rates == {
            at: undisturbed.rates[at] for at in undisturbed.rates if at >= step
        }
        due = step + ("validation" in checkpoint.name)
        expected = [one for one in undisturbed.validated if one[0] >= due]
        assert [at for at, _ in resumed.validated] == [at for at, _ in expected], checkpoint.name
        assert [loss for _, loss in resumed.validated] == pytest.approx(
            [loss for _, loss in expected], rel=1e-4
        )
        assert_close(end, weights)


def test_a_validation_made_up_for_at_an_epochs_end_can_be_gone_on_from(
    small_shards: Path, tmp_path: Path
) -> None:
    """Resumed between an epoch's last step and its validation, and again right behind that."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    undisturbed, _ = fit(small_shards, save=once, norm=False, **cut(1))
    fit(small_shards, resume=once / "06-step.ckpt", save=twice, norm=False, **cut(2))
    resumed, _ = fit(small_shards, resume=twice / "06-validation.ckpt", norm=False, **cut(4))
    samples = by_step(undisturbed)
    assert by_step(resumed) == {key: those for key, those in samples.items() if key[1] >= 6}
    assert [at for at, _ in resumed.validated] == [12]


class SaveInValidation(lightning.Callback):
    """Saves behind the first batch of each validation, as a preempted run may."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_validation_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        if not trainer.sanity_checking and arguments[3] == 0:
            trainer.save_checkpoint(self._folder / f"{trainer.global_step:02}.ckpt")


def test_a_validation_that_was_left_is_done_in_other_pieces(
    small_shards: Path, tmp_path: Path
) -> None:
    """With other batches of its own, too; then the run goes on."""
    options: dict[str, Any] = {"val_check_interval": 0.34, "norm": False}
    more = (SaveInValidation(tmp_path),)
    undisturbed, weights = fit(small_shards, more=more, **cut(4), **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 6
    for checkpoint in checkpoints[::-2]:
        step = int(checkpoint.stem)
        resumed, end = fit(small_shards, resume=checkpoint, **cut(1), **options)
        samples = {key: those for key, those in by_step(undisturbed).items() if key[1] >= step}
        assert by_step(resumed) == samples, step
        assert [at for at, _ in resumed.validated] == list(range(step, 13, 2)), step
        assert_close(end, weights)


class CrashError(Exception):
    """Raised in the middle of a run."""


class Crash(lightning.Callback):
    """Ends a run in front of a batch: the one of this number within this step."""

    def __init__(self, step: int, batch: int = 0) -> None:
        self._step = step
        self._left = batch

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            if not self._left:
                raise CrashError
            self._left -= 1


def test_checkpoints_and_validations_come_when_they_are_due(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended twice and cut anew each time: the same files at the same steps, none inside a step."""
    saved: list[tuple[str, int]] = []
    save = AtomicCheckpointIO.save_checkpoint

    def noting(
        self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, **options: Any
    ) -> None:
        ready = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert ready == checkpoint["global_step"] * checkpoint["split"]["accumulate"]
        saved.append((Path(path).name.split("-val_acc1")[0], checkpoint["global_step"]))
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", noting)
    options: dict[str, Any] = {
        "val_check_interval": 0.34,  # behind every second step
        "checkpoint_every_n_steps": 3,
        "norm": False,
    }
    whole, weights = fit(small_shards, run=tmp_path / "whole", **cut(1), **options)
    expected, saved[:] = saved[:], []
    assert {("last.ckpt", step) for step in (3, 6, 9, 12)} < {*expected}

    run = tmp_path / "run"
    seen: dict[tuple[int, int], list[int]] = {}
    # The first checkpoint to go on from is of step 4; the second one of 9, and none of behind it.
    for pieces, crash in ((2, Crash(5, 1)), (4, Crash(9, 2)), (2, None)):
        begun, checkpoint = at_step(run), newest_whole(run / "checkpoints").path
        try:
            more = () if crash is None else (crash,)
            witness, end = fit(
                small_shards, resume=checkpoint, run=run, more=more, **cut(pieces), **options
            )
        except CrashError:
            assert begun < crash._step if crash else False
            continue
        seen = by_step(witness)
        assert begun == 9
        assert [at for at, _ in witness.validated] == [10, 12]
    assert seen == {key: samples for key, samples in by_step(whole).items() if key[1] >= 9}
    assert_close(end, weights)
    # At the end of a run that has found no better weights since it began, Lightning writes the last
    # ones once more.
    assert saved in (expected, [*expected, expected[-1]])
