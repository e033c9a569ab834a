"""A run that was stopped anywhere goes on as if it had not been: samples, order, weights."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

import train as train_program
from loaders.augment import AugmentConfig
from loaders.sizes import ProgressiveConfig
from model.loss import LossConfig
from model.mixup import MixConfig
from model.optim import OptimConfig
from model.schedule import ScheduleConfig
from tests.conftest import write_recipe
from tests.runs import TRAIN, steps_of, weights_of
from tests.witness import STEPS, fit

TWO = ("--devices", "2", "--batch_size", "4")


@pytest.mark.parametrize(
    ("workers", "every", "options"),
    [
        (0, 1, {}),
        (2, 4, {}),
        (0, 1, {"val_check_interval": 0.5}),
        (2, 5, {"val_check_interval": 0.34}),
        (0, 3, {"batch_size": 4, "accumulate": 2}),
        (0, 2, {"batch_size": 4, "accumulate": 2, "val_check_interval": 0.5}),
        (0, 3, {"data_options": {"augment": AugmentConfig(policy="randaugment")}}),
        (0, 3, {"data_options": {"augment": AugmentConfig(erase_probability=0.5), "repeats": 2}}),
        (2, 4, {"data_options": {"progressive": ProgressiveConfig(start_size=12, end_epoch=1)}}),
    ],
    ids=str,
)
def test_resumes_from_every_checkpoint(
    small_shards: Path, tmp_path: Path, workers: int, every: int, options: dict[str, Any]
) -> None:
    """After any step, in an epoch, at its end, or after a validation: same samples, same weights.

    With `every` only each so-manieth checkpoint is tried, from the last one back.
    """
    undisturbed, weights = fit(small_shards, workers=workers, save=tmp_path, **options)
    assert len({step for _, step, _ in undisturbed.seen}) == 2 * STEPS
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 2 * STEPS + 2
    for checkpoint in checkpoints[::-every]:
        step = int(checkpoint.name[:2])
        resumed, end = fit(small_shards, workers=workers, resume=checkpoint, **options)
        expected = [line for line in undisturbed.seen if line[1] >= step]
        assert resumed.seen == expected, checkpoint.name
        assert all(torch.equal(end[name], weights[name]) for name in weights), checkpoint.name


MIXUP, CUTMIX = MixConfig(mixup_alpha=0.5), MixConfig(cutmix_alpha=1.0)
BOTH = MixConfig(mixup_alpha=0.5, cutmix_alpha=1.0, probability=0.8)
PLATEAU = ScheduleConfig(name="plateau", plateau_patience=0, plateau_gamma=0.5, warmup_epochs=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": ScheduleConfig(name="cosine", warmup_epochs=1, final_factor=0.1)},
        {"schedule": ScheduleConfig(name="step", warmup_epochs=0, step_epochs=1)},
        {"schedule": ScheduleConfig(name="piecewise", points=[[0, 0], [0.7, 1], [2, 0]])},
        {"schedule": PLATEAU, "val_check_interval": 0.34},
        {"model_options": {"mix": MIXUP}},
        {"model_options": {"mix": CUTMIX}},
        {"model_options": {"mix": BOTH}, "batch_size": 4, "accumulate": 2},
        {"model_options": {"mix": BOTH, "loss": LossConfig(name="bce", bce_threshold=0.2)}},
        {"ema_decay": 0.9},
        {"ema_decay": 0.8, "ema_every_n_steps": 4, "batch_size": 4, "accumulate": 2},
        {"middle": (nn.Dropout(0.4), StochasticDepth(0.4, "row"))},
        {"model_options": {"optim": OptimConfig(name="lamb", norm_weight_decay=False)}},
        {"model_options": {"optim": OptimConfig(nesterov=True)}, "gradient_clip_val": 0.5},
    ],
    ids=str,
)
def test_what_a_recipe_adds_resumes_to_the_bit(
    small_shards: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Samples, rates, weights and their average, from inside an epoch and from its end."""
    undisturbed, weights = fit(small_shards, save=tmp_path, **options)
    assert len(set(undisturbed.rates.values())) > 1
    plain, _ = fit(small_shards)
    assert [line[2] for line in undisturbed.seen] == [line[2] for line in plain.seen] or (
        "accumulate" in options  # micro-batches
    )
    places = ["02-step", "06-step", "06-validation", "09-step"]
    if "val_check_interval" in options:  # which is behind every second step
        places += ["02-validation", "10-step"]
    for place in places:
        step = int(place[:2])
        resumed, end = fit(small_shards, resume=tmp_path / f"{place}.ckpt", **options)
        assert resumed.seen == [line for line in undisturbed.seen if line[1] >= step], place
        expected = {at: rate for at, rate in undisturbed.rates.items() if at >= step}
        assert resumed.rates == expected, place
        done = step + ("validation" in place)
        assert resumed.validated == [one for one in undisturbed.validated if one[0] >= done], place
        assert end.keys() == weights.keys()
        assert all(torch.equal(end[name], weights[name]) for name in weights), place


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"limit_train_batches": 0.5}, [3, 3]),
        ({"overfit_batches": 2}, [2, 2]),
        ({"fast_dev_run": True}, [1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("workers", [0, 2])
def test_shortened_epochs_start_at_their_own_beginning(
    small_shards: Path, workers: int, options: dict[str, Any], batches: list[int]
) -> None:
    """Each epoch that Lightning cuts short begins at position 0 of that epoch."""
    whole, _ = fit(small_shards)
    cut, _ = fit(small_shards, workers=workers, **options)
    for epoch, count in enumerate(batches):
        expected = [numbers for e, _, numbers in whole.seen if e == epoch][:count]
        assert [numbers for e, _, numbers in cut.seen if e == epoch] == expected
    assert len(cut.seen) == sum(batches)


def train(recipe: Path, run: Path, *options: str) -> None:
    """Run train.py to its end."""
    done = subprocess.run(
        [*TRAIN, "--config", str(recipe), "--run", str(run), *options],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def train_and_kill(recipe: Path, run: Path, *options: str, at_line: int) -> None:
    """Start train.py; kill it and all its processes once rank 0 has begun so many steps."""
    trace = run / "samples-rank0.jsonl"
    with subprocess.Popen(
        [*TRAIN, "--config", str(recipe), "--run", str(run), *options],
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        while not trace.exists() or trace.read_bytes().count(b"\n") < at_line:
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"training ended by itself with status {process.wait(0.05)}")
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two processes; workers and validations change none of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "small.yaml", small_shards)
    train(recipe, folder / "run", *TWO)
    return folder / "run"


@pytest.mark.parametrize(
    ("workers", "at_line", "options"),
    [
        (2, 10, []),  # in the middle of the second epoch: last.ckpt is of step 8
        (0, STEPS + 1, []),  # at an epoch's end: of the validation behind step 6
        (2, 4, ["trainer.val_check_interval=0.5"]),  # of the validation behind step 3
    ],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the copy of a folder goes on
def test_killed_processes_resume(
    small_recipe: Path,
    whole: Path,
    tmp_path: Path,
    workers: int,
    at_line: int,
    options: list[str],
) -> None:
    """Killed with SIGKILL, two processes go on with the same weights, one with the same order."""
    common = ["--num_workers", str(workers), *options]
    two, killed = [*TWO, *common], tmp_path / "killed"
    expected = steps_of(whole, 2)
    assert sorted(expected) == list(range(2 * STEPS))

    train_and_kill(small_recipe, killed, *two, at_line=at_line)
    other = tmp_path / "other"
    shutil.copytree(killed, other)
    train(small_recipe, killed, *two, "--resume", "auto")
    assert steps_of(killed, 2) == expected
    assert all(torch.equal(w, weights_of(whole)[name]) for name, w in weights_of(killed).items())

    (other / "samples-rank0.jsonl").unlink()
    alone_again = ["--config", str(small_recipe), "--run", str(other), *common, "--resume", "auto"]
    assert train_program.main(alone_again) == 0
    alone = steps_of(other, 1)
    assert max(alone) == 2 * STEPS - 1
    assert 0 < min(alone) < at_line
    assert alone == {step: expected[step] for step in alone}
