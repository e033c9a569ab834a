"""bench_resume: the figures and verdicts, and a round of it on small shards."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import bench_resume
from scripts.bench_resume import Case, First, Task, first_batch, summarize, verdicts


def first(seconds: float, reads: int = 0) -> First:
    """A measurement."""
    return First(ready=0.0, seconds=seconds, reads=reads, read_bytes=1000 * reads)


def test_a_resume_is_compared_with_the_fresh_start_of_its_place() -> None:
    """Medians decide; what a proxy counted stands in the place of system calls."""
    fresh, half = Case(place="S3", share=0.0), Case(place="S3", share=0.5)
    other = Case(place="local", share=0.0)
    skips = Case(place="local", share=0.5, contender="webdataset")
    measured = {
        fresh: [first(1.0), first(1.1), first(9.0)],
        half: [first(1.2), first(1.21), first(1.3)],
        other: [first(0.1, 7)],
        skips: [first(0.4, 70)],
    }
    rows = summarize(measured, {half: first(2.0, 12)})
    assert [round(row.times_fresh, 9) for row in rows] == [1, 1.1, 1, 4]
    assert [row.reads for row in rows] == [0, 12, 7, 70]
    assert verdicts(rows) == {"S3, resume at 50%: at most 1.1 x a fresh start": "kept (1.10 x)"}
    measured[half] = [first(1.22)]
    assert list(verdicts(summarize(measured, {})).values()) == ["missed (1.11 x)"]


def test_a_round_on_small_shards(
    small_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All cases, local and on moto, here instead of in processes of their own; what they read."""

    def measure_here(task: Task, endpoint: str) -> First:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        return first_batch(task)

    monkeypatch.setattr(bench_resume, "measure", measure_here)
    monkeypatch.setattr(bench_resume, "LEAST_BATCHES", 10)
    monkeypatch.setattr(bench_resume, "SHARES", (0.0, 0.99))
    out = tmp_path / "out.json"
    arguments = f"--shards {small_shards / 'train'} --batch 1 --rounds 1 --workers 1 --json {out}"
    assert bench_resume.main(arguments.split()) == 0
    found = json.loads(out.read_text())
    places = [row["case"]["place"] for row in found["summary"]]
    assert places == ["local", "local", "S3", "S3", "local"]
    assert all(row["reads"] > 0 and row["read_mb"] > 0 for row in found["summary"])
    assert len(found["must_hold"]) == 2
    assert "webdataset skips ahead to 50%" in capsys.readouterr().out


def test_a_process_of_its_own_measures(small_shards: Path, tmp_path: Path) -> None:
    """The command line that a measurement is started with."""
    task = Task(
        contender="shardstream",
        url=str(small_shards / "train"),
        share=0.5,
        cache=str(tmp_path / "c"),
        workers=1,
        batch=1,
    )
    made = bench_resume.measure(task, "")
    assert made.seconds > 0
    assert made.reads > 0
    with pytest.raises(ChildProcessError, match=r"at 50%: .*nowhere has no manifest.json"):
        bench_resume.measure(replace(task, url=str(tmp_path / "nowhere")), "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "give either --shards PATH_OR_URL or --images FOLDER"),
        ("--shards SHARDS", "has 51 samples; 99% of an epoch needs 6400 at least"),
    ],
)
def test_wrong_use_is_one_line(
    small_shards: Path, arguments: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2."""
    given = arguments.replace("SHARDS", str(small_shards / "train")).split()
    assert bench_resume.main(given) == 2
    assert text in capsys.readouterr().err
