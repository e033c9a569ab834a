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
    written = json.loads((tmp_path / "out.json").read_text())
    rates = written["images_per_s"]
    assert rates.keys() == {"roof", "loader alone", "end to end"}
    assert min(rates.values()) > 0
    assert written["verdict"] in capsys.readouterr().out
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


def facts(processes: int, rate: float) -> bench_train.Facts:
    """Of a measurement whose three rates are the same."""
    rates = dict.fromkeys(("roof", "loader alone", "end to end"), rate)
    return {"processes": processes, "images_per_s": rates}


def test_efficiency_is_the_rate_over_that_of_one_process_times_their_number() -> None:
    """Four processes that are three times as fast as one are worth 75%."""
    one, four = facts(1, 100.0), facts(4, 300.0)
    shares = bench_train.efficiency(four["images_per_s"], one["images_per_s"], processes=4)
    assert set(shares.values()) == {0.75}
    head, first, second = bench_train.table([one, four])
    assert head.split()[0] == "processes"
    assert first.split()[:3] == ["1", "100.0", "100.0%"]
    assert second.split()[:3] == ["4", "300.0", "75.0%"]


def test_one_and_two_processes_are_measured_and_compared(
    small_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each by a program of its own; on the CPU it is said what the figures are not."""
    out = tmp_path / "out.json"
    arguments = ["--config", str(small_recipe), "--steps", "3", "--skip", "1"]
    assert bench_train.main([*arguments, "--devices", "1,2", "--json", str(out)]) == 0
    one, two = json.loads(out.read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert "batch 8 x 2 processes" in two["title"]
    assert min(*one["images_per_s"].values(), *two["images_per_s"].values()) > 0
    text = capfd.readouterr().out
    assert "This says nothing of GPUs." in text
    assert bench_train.table([one, two])[2] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "2,4"), "must rise from 1, like 1,2,4; got 2,4"),
        (("--devices", "1,2", "--against", "one.json"), "not allowed with argument"),
        (("--against", "nowhere.json"), "--against nowhere.json: no figures that --json wrote"),
        (("--against", "eight.json"), "--against eight.json: these are 8 processes, not one"),
    ],
)
def test_each_mistake_is_named(
    small_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    """Before anything is measured; status 2."""
    monkeypatch.chdir(tmp_path)
    Path("eight.json").write_text(json.dumps(facts(8, 1.0)))
    try:
        status = bench_train.main(["--config", str(small_recipe), *arguments])
    except SystemExit as error:  # argparse's own
        status = int(str(error.code))
    assert status == 2
    assert message in capsys.readouterr().err
