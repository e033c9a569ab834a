"""trace_loader: one line a global step, the same for every topology and format."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.trace_loader import line, main
from tests.make_shards import ORDER, PACKING, STEPS, data_set, make_loader, open_shards

PROGRAM = Path(__file__).parents[1] / "scripts" / "trace_loader.py"
COMMON = (
    f"--global_batch 12 --image_size 16 --seed {ORDER.seed} --lanes {ORDER.lanes} "
    f"--window {ORDER.window} --pack_seed {PACKING.seed} --max_samples {PACKING.max_samples} "
)


def trace(capsys: pytest.CaptureFixture[str], options: str, folder: str = "shards") -> list[str]:
    """Lines that main() prints for these options."""
    assert main([str(data_set() / folder), *(COMMON + options).split()]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_any_start_on_any_topology(
    world: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a random epoch and step the lines are those of an undisturbed run of one process."""
    drawn = random.Random(f"{world} {workers}")
    epoch, first = drawn.randrange(1 << 24), drawn.randrange(STEPS)
    whole = trace(capsys, f"--keys --epoch {epoch}")
    options = f"--keys --epoch {epoch} --from {first} --world {world} --workers {workers}"
    assert trace(capsys, options) == whole[first:]
    assert len(whole) == STEPS


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ("--accumulate 3", "shards"),
        ("--accumulate 2 --world 3 --workers 1", "shards"),
        ("--format imagefolder", "images"),
        ("--format imagefolder --world 2 --workers 1 --accumulate 2", "images"),
    ],
)
def test_accumulation_and_format(
    options: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither accumulation nor the format changes a line."""
    expected = trace(capsys, "--epoch 2 --keys")
    assert trace(capsys, f"--epoch 2 --keys {options}", folder) == expected


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A line is step and hash; --keys adds the sample keys, --json makes it an object."""
    plain, keyed = trace(capsys, "--from 1"), trace(capsys, "--from 1 --keys")
    objects = [json.loads(text) for text in trace(capsys, "--from 1 --json")]
    assert [f"{fact['step']} {fact['xxh3']}" for fact in objects] == plain
    assert [fact["step"] for fact in objects] == [1, 2]
    keys = {open_shards().key(number) for number in range(43)}
    for shorter, longer in zip(plain, keyed, strict=True):
        assert longer.startswith(f"{shorter} ")
        _, _, *found = longer.split()
        assert len(set(found)) == 12
        assert set(found) <= keys
    assert trace(capsys, "--steps 1 --from 1") == plain[:1]
    assert [*json.loads(trace(capsys, "--json --keys --steps 1")[0])] == ["step", "xxh3", "keys"]


def test_hash_depends_on_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Another size of image, seed, epoch, step or label is another hash."""
    options = ["", "--image_size 17", "--seed 6", "--epoch 1"]
    hashes = [found.split()[1] for text in options for found in trace(capsys, text)]
    assert len(set(hashes)) == len(options) * STEPS
    batch = next(iter(make_loader()))
    assert line(0, [batch]) != line(0, [batch._replace(labels=batch.labels ^ 1)])


def test_program(capsys: pytest.CaptureFixture[str]) -> None:
    """As a program it prints what main() prints, and exits with what main() returns."""
    arguments = [str(data_set() / "shards"), *f"{COMMON} --workers 1".split()]
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert main(arguments) == done.returncode == 0
    expected = capsys.readouterr()
    assert (done.stdout, done.stderr) == (expected.out, expected.err)


@pytest.mark.parametrize(
    ("folder", "options", "status", "message"),
    [
        ("nothing", "", 3, "nothing/train has no manifest.json: there is no such folder"),
        ("images", "", 3, "images/train has no manifest.json"),
        ("nothing", "--format imagefolder", 2, "is no folder; give an ImageFolder"),
        ("shards", "--world 5", 2, "not divisible by 5 processes"),
        ("shards", "--world 2 --accumulate 4", 2, "not divisible by 2 processes x 4"),
        ("shards", "--global_batch 44", 2, "43 samples are fewer than one global batch of 44"),
    ],
)
def test_bad_input(
    folder: str, options: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be traced is one clear line on stderr and nothing on stdout."""
    assert main([str(data_set() / folder), *(COMMON + options).split()]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", str(1 << 64)], "seed must be in"),
        (["--lanes", "2000000"], "lanes must be in"),
        (["--epoch", "20000000"], "--epoch must be below"),
        (["--from", "999"], "an epoch has"),
    ],
)
def test_numbers_out_of_range_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and status 2."""
    status = main([str(data_set() / "shards"), "--global_batch", "8", *arguments])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
