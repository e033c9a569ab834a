"""tune_workers: which numbers are tried, when it stops, what it recommends; and once for real."""

import json
from pathlib import Path

import pytest

from scripts import tune_workers


def test_all_small_numbers_and_ever_larger_steps() -> None:
    """0 to 8 each, then coarser, and always the last."""
    assert list(tune_workers.candidates(3)) == [0, 1, 2, 3]
    expected = [*range(9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48]
    assert list(tune_workers.candidates(48)) == expected
    assert list(tune_workers.candidates(11)) == [*range(9), 10, 11]


@pytest.mark.parametrize(
    ("rates", "tried", "recommended"),
    [
        ([100, 95, 190, 280, 370, 465], 6, 5),  # it still gains at the cores
        ([100, 95, 190, 200, 201, 200, 900], 6, 3),  # two without a gain end it
        ([100, 90, 95, 300], 3, 0),  # the training process alone is as fast
        ([100, 90, 200, 199, 260, 262, 261], 7, 4),  # one without a gain does not
    ],
)
def test_it_stops_where_more_workers_gain_nothing(
    rates: list[int], tried: int, recommended: int
) -> None:
    """The fewest workers within 3% of the best."""
    found = tune_workers.search(lambda workers: float(rates[workers]), len(rates) - 1)
    assert list(found) == list(range(tried))
    assert tune_workers.recommend(found) == recommended


def test_a_recipe_is_measured(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each number, and the key to set; the rates as JSON."""
    line = ["--config", str(small_recipe), "--most", "1", "--seconds", "0.2"]
    assert tune_workers.main([*line, "--json", str(tmp_path / "out.json")]) == 0
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["images_per_s"].keys() == {"0", "1"}
    assert min(facts["images_per_s"].values()) > 0
    assert f"recommended: data.num_workers={facts['recommended']}\n" in capsys.readouterr().out
    assert tune_workers.main([*line, "--seconds", "0"]) == 2
    assert "--seconds must be more than 0" in capsys.readouterr().err
