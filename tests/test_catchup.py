"""model/catchup.py: which resumed runs validate first; tests/test_resume.py compares whole runs."""

from types import SimpleNamespace
from typing import Any

import pytest

from model.catchup import MissedValidation


class Trainer:
    """What the callback looks at of a trainer at step 12, and how often it validates."""

    def __init__(self, *, ckpt_path: str | None = "some", ready: int = 3, due: bool = True) -> None:
        self.ckpt_path = ckpt_path
        self.global_step = 12
        self.enable_validation = True
        self.sanity_checking = False
        self.training = self.validating = False
        self.runs = 0
        loop = SimpleNamespace(
            batch_progress=SimpleNamespace(current=SimpleNamespace(ready=ready)),
            val_loop=SimpleNamespace(restarting=True, run=self._run, _has_run=False),
            _should_check_val_fx=lambda fetcher: due,
        )
        counts = [SimpleNamespace(ready=2, completed=1) for _ in range(2)]
        progress = SimpleNamespace(current=counts[0], total=counts[1])
        self.fit_loop = SimpleNamespace(epoch_loop=loop, epoch_progress=progress)
        self.checkpoint_callbacks: list[Any] = []

    def _run(self) -> None:
        assert self.validating
        assert not self.fit_loop.epoch_loop.val_loop.restarting
        self.runs += 1


@pytest.mark.parametrize(
    ("options", "validated", "runs"),
    [
        ({}, 6, 1),
        ({}, 12, 0),  # the checkpoint is of behind the validation
        ({"due": False}, 6, 0),
        ({"ckpt_path": None}, -1, 0),  # a new run
        ({"ready": 0}, 6, 0),  # between epochs
    ],
)
def test_a_validation_that_was_due_is_made_up_for(
    options: dict[str, Any], validated: int, runs: int
) -> None:
    """Once, where there is one."""
    callback, trainer = MissedValidation(), Trainer(**options)
    callback.load_state_dict({"validated": validated})
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert trainer.runs == runs
    assert trainer.training == bool(runs)


def test_each_validation_that_came_to_its_end_is_noted() -> None:
    """In what a checkpoint keeps; not the sanity check, nor one that has only begun."""
    callback, trainer = MissedValidation(), Trainer()
    trainer.sanity_checking = True
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert callback.state_dict() == {"validated": -1}
    trainer.sanity_checking = False
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert callback.state_dict() == {"validated": 12}
