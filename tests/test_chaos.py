"""scripts/chaos.py: what it compares, and that it notices; the faults themselves take minutes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from scripts import chaos
from scripts.chaos import Scene, Seen
from scripts.chaos_run import Chaos, Training, differences


def run_of(folder: Path, steps: dict[int, list[str]], weight: float = 1.0) -> Path:
    """What a run of two ranks leaves: each has half of a step's keys."""
    (folder / "checkpoints").mkdir(parents=True)
    for rank in range(2):
        lines = [{"step": step, "keys": keys[rank::2]} for step, keys in steps.items()]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"samples-rank{rank}.jsonl").write_text(text)
    state = {"state_dict": {"weight": torch.tensor(weight)}}
    torch.save(state, folder / "checkpoints" / "last.ckpt")
    return folder


STEPS = {0: ["a", "b"], 1: ["c", "d"]}


def test_differences_are_found(tmp_path: Path) -> None:
    """Other samples in a step, a step too few, other weights; repeated steps count once."""
    whole = run_of(tmp_path / "whole", STEPS)
    assert differences(run_of(tmp_path / "same", STEPS), whole) == []
    with (whole / "samples-rank0.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 1, "keys": ["c"]}) + "\n" + '{"step": 2, "ke')
    assert differences(tmp_path / "same", whole) == []
    swapped = run_of(tmp_path / "swapped", {0: ["a", "b"], 1: ["d", "c"]})
    assert differences(swapped, whole) == ["samples"]
    assert differences(run_of(tmp_path / "few", {0: ["a", "b"]}), whole) == ["samples"]
    other = run_of(tmp_path / "other", STEPS, weight=1.0000001)
    assert differences(other, whole) == ["weights"]


@pytest.mark.parametrize(
    ("steps", "seconds", "row"),
    [
        (STEPS, 3.0, (True, ["fake", "it fell over", "3.0 s", "the same samples and weights"])),
        (STEPS, 31.0, (False, ["fake", "it fell over", "31.0 s LATE", "the same samples"])),
        ({0: ["a", "b"]}, 3.0, (False, ["fake", "it fell over", "3.0 s", "OTHER SAMPLES"])),
    ],
)
def test_a_row_of_the_table(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: dict[int, list[str]],
    seconds: float,
    row: tuple[bool, list[str]],
) -> None:
    """Late, or continued otherwise: not right."""

    def fake(scene: Scene) -> Seen:
        run_of(scene.folder, steps)
        return Seen(what="it fell over", seconds=seconds, limit_s=30, said="ouch")

    monkeypatch.setitem(chaos.FAULTS, "fake", fake)
    run_of(tmp_path / "whole", STEPS)
    right, found = chaos.cause("fake", tmp_path, seed=1, steps=2)
    assert right == row[0]
    assert [text[: len(expected)] for text, expected in zip(found, row[1], strict=True)] == row[1]


def test_a_fault_that_cannot_be_caused_is_skipped_and_one_without_effect_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without root some cannot; that is no failure."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert chaos.cause("disk", tmp_path, seed=1, steps=9)[0]
    assert "skipped: it mounts a tmpfs, which takes root" in capsys.readouterr().out

    def fake(scene: Scene) -> Seen:
        raise Chaos("nobody named rank 1")

    monkeypatch.setitem(chaos.FAULTS, "fake", fake)
    assert not chaos.cause("fake", tmp_path, seed=1, steps=9)[0]
    assert "FAILED: nobody named rank 1" in capsys.readouterr().out


def test_the_same_seed_strikes_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one elsewhere."""
    struck = []

    def fake(scene: Scene) -> Seen:
        struck.append((scene.step(), scene.rank(), scene.step()))
        raise Chaos("enough")

    monkeypatch.setitem(chaos.FAULTS, "fake", fake)
    for seed in (1, 1, 2):
        chaos.cause("fake", tmp_path, seed=seed, steps=44)
    assert struck[0] == struck[1] != struck[2]


def test_a_training_knows_its_processes_and_leaves_none(tmp_path: Path) -> None:
    """Those that left its session and lost their parent, too; and waits for all but one of them."""
    program = (
        "import subprocess, sys\n"
        "code = 'import sys; sys.stdin.read()'\n"
        "run = lambda: subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE,"
        " start_new_session=True)\n"
        "children = [run(), run()]\n"
        "print(*(child.pid for child in children), flush=True)\n"
        "children[1].wait()\n"
    )
    with Training([sys.executable, "-c", program], tmp_path / "run") as training:
        while not training.text().endswith("\n"):
            assert training.process.poll() is None
        one, other = map(int, training.text().split())
        assert set(training.processes()) == {training.process.pid, one, other}
        os.kill(one, signal.SIGKILL)
        os.kill(training.process.pid, signal.SIGSTOP)
        with pytest.raises(Chaos, match="still there after"):
            training.wait(0.1)
        assert training.wait(5, but=training.process.pid) < 5
    assert training.processes() == []


def test_unknown_faults_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """And those that there are."""
    assert chaos.main(["earthquake"]) == 2
    assert "no fault earthquake; there are kill, stop, preempt" in capsys.readouterr().err
    assert chaos.main([]) == 2
