"""model/callbacks.py: an inexact validation fails, the trace holds every batch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loaders.pipeline import Batch
from model.callbacks import ExactValidation, ProgressLines, SampleTrace


def trainer(seen: int = 13, **attributes: Any) -> Any:
    """What the callbacks look at of a trainer after a validation."""
    values = {
        "sanity_checking": False,
        "state": SimpleNamespace(fn="fit"),
        "fast_dev_run": False,
        "limit_val_batches": 1.0,
        "overfit_batches": 0,
        "is_global_zero": True,
        "current_epoch": 3,
        "global_step": 70,
        "global_rank": 1,
        "progress_bar_callback": None,
        "callback_metrics": {"val/seen": torch.tensor(float(seen)), "val/acc1": torch.tensor(0.5)},
    }
    return SimpleNamespace(**(values | attributes))


def test_a_validation_that_missed_images_fails_the_run() -> None:
    """Fewer or more images than the split has raise; as many pass."""
    check: Any = ExactValidation(13)
    check.on_validation_end(trainer(13), None)
    for seen in (12, 14):
        with pytest.raises(RuntimeError, match=f"saw {seen} images, the split has 13"):
            check.on_validation_end(trainer(seen), None)


@pytest.mark.parametrize(
    "attributes",
    [
        {"sanity_checking": True},
        {"limit_val_batches": 0.5},
        {"fast_dev_run": True},
        {"overfit_batches": 1},
    ],
)
def test_a_validation_that_is_not_meant_to_be_whole_is_not_checked(
    attributes: dict[str, Any],
) -> None:
    """The sanity check and limited runs may see fewer."""
    check: Any = ExactValidation(13)
    check.on_validation_end(trainer(2, **attributes), None)


def test_a_validation_is_one_line_of_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    """Epoch, step and the metrics there are."""
    lines: Any = ProgressLines()
    lines.on_validation_end(trainer(), None)
    lines.on_validation_end(trainer(is_global_zero=False), None)
    lines.on_validation_end(trainer(state=SimpleNamespace(fn="validate")), None)  # eval.py
    assert capsys.readouterr().out == "epoch 3, step 70: val/acc1 0.5000\n"
    above: list[str] = []
    bar = SimpleNamespace(print=above.append)
    lines.on_validation_end(trainer(progress_bar_callback=bar), None)
    assert above == ["epoch 3, step 70: val/acc1 0.5000"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("batches", "done", "left"),
    [(8, "50%", "12 s"), (100, "4%", "5 min"), (400, "1%", "20 min"), (9000, "0%", "7.5 h")],
)
def test_long_epochs_are_heard_of(
    batches: int, done: str, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line when the time is up: share done, images/s of all ranks, what is left."""
    now = 100.0
    lines: Any = ProgressLines(every_s=10, clock=lambda: now)
    batch = Batch(torch.zeros(0), torch.zeros(32), torch.zeros(32))
    loss = {"train/loss": torch.tensor(2.5)}
    for first in (True, False):
        state = trainer(
            world_size=2,
            num_training_batches=batches,
            callback_metrics=loss,
            is_global_zero=first,
        )
        lines.on_train_start(state, None)  # and no epoch's: it goes on inside one
        for index in range(6):  # the fourth ends after 12 s: 256 images
            lines.on_train_batch_end(state, None, None, batch, index)
            now += 4
    expected = f"epoch 3, {done} (step 70): 21 images/s, {left} left of the epoch"
    assert capsys.readouterr().out == f"{expected}, train/loss 2.5000\n"


def test_the_trace_grows_by_a_line_a_batch(tmp_path: Path) -> None:
    """Keys, epoch, step and batch; a resumed run appends to its rank's file."""
    batch = Batch(torch.zeros(2, 1, 1, 3), torch.zeros(2), torch.tensor([4, 9]))
    for index in range(2):
        trace: Any = SampleTrace(tmp_path / "run", lambda numbers: [f"key{n}" for n in numbers])
        trace.on_train_batch_start(trainer(), None, batch, index)
    lines = (tmp_path / "run" / "samples-rank1.jsonl").read_text().splitlines()
    expected = {"epoch": 3, "step": 70, "keys": ["key4", "key9"]}
    assert [json.loads(line) for line in lines] == [expected | {"batch": i} for i in range(2)]
