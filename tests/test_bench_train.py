"""bench_train: three rates and a verdict, and the check of what reaches the device."""

import json
from pathlib import Path

import pytest
import torch

from loaders.pipeline import Batch
from scripts import bench_train
from sharding.errors import DataError


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
def test_three_rates_and_a_verdict(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains past an epoch's end, prints the rates, and says what limits them."""
    arguments = ["--config", str(small_recipe), "--steps", "7", "--skip", "2"]
    assert bench_train.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    facts = json.loads((tmp_path / "out.json").read_text())
    rates = facts["images_per_s"]
    assert rates.keys() == {"roof", "loader alone", "end to end"}
    assert min(rates.values()) > 0
    assert facts["verdict"] in capsys.readouterr().out
    assert bench_train.verdict(rates | {"roof": 1, "loader alone": 2}) == "compute-bound"
    assert bench_train.verdict(rates | {"roof": 2, "loader alone": 1}) == "input-bound"


def test_another_first_batch_is_an_error() -> None:
    """One bit of one pixel that is not what the CPU made ends the measurement."""
    first = Batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.arange(2), torch.arange(2))
    clock = bench_train.Clock(skip=1, steps=1, first=first)
    clock.on_train_batch_start(None, None, first, 0)  # type: ignore[arg-type]
    other = first._replace(images=first.images.clone())
    other.images[1, 2, 3, 0] = 1
    with pytest.raises(DataError, match="not the one that the CPU made"):
        clock.on_train_batch_start(None, None, other, 0)  # type: ignore[arg-type]
