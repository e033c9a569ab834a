"""The commands that pack: what users type and read."""

import json
from pathlib import Path

import pytest

from sharding.dataset import open_splits
from tests.conftest import Call, assert_refused
from tests.make_images import write_files


def test_training_needs_both_splits(call_in: Call) -> None:
    """Who packs one split alone is told what is left to pack, until it is packed."""
    left = "next: out has no val/ yet, which train.py needs: shard.py pack SRC/val out\n"
    assert call_in("pack in/train out")[1].endswith(f" JPEG)\n{left}")
    assert left not in call_in("pack in/val out")[1]
    assert left not in call_in("pack in/train out")[1]
    assert "has no val" not in call_in("pack in/val other")[1]
    assert "has no val" not in call_in("pack in/train parts --part 0/1")[1]  # not sealed yet
    assert "next: parts has no val/ yet" in call_in("seal in/train parts")[1]


def test_val_is_looked_at_before_train_is_packed(call_in: Call) -> None:
    """Its mistakes are not told after the hours that train takes."""
    write_files(Path("in/val"), {"c/x.jpg": b"1"})
    status, out, err = call_in("pack in out")
    assert (status, out) == (2, "")
    assert "in/val has the class 'c' that is none of the 2 classes" in err
    assert not list(Path("out").rglob("*.tar"))


def test_rejects_are_said_and_listed(call_in: Call) -> None:
    """Skipped images: counts that add up, a warning that names the list."""
    write_files(Path("in/train"), {"a/zero.jpg": b"", "b/text.png": b"hello"})
    status, out, err = call_in("pack in out --on_bad skip")
    assert status == 0
    assert "train: 18 images found = 16 packed + 2 rejected (0 other files ignored)" in out
    assert err == "warning: 2 rejected images, listed in out/train/rejected.jsonl\n"
    lines = Path("out/train/rejected.jsonl").read_text().splitlines()
    rejected = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert rejected.keys() == {"a/zero.jpg", "b/text.png"}
    assert rejected["a/zero.jpg"] == "is empty"
    assert json.loads(call_in("info out --json")[1])[0]["images_rejected"] == 2
    assert call_in("verify out")[0] == 0


def test_slurm_says_the_part(call_in: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--part slurm` is this task of the step; in all they are the whole."""
    for task in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(task))
        monkeypatch.setenv("SLURM_NTASKS", "2")
        assert f"part {task} of 2" in call_in("pack in out --max_samples 2 --part slurm")[1]
    assert call_in("seal in out --max_samples 2")[0] == 0
    assert call_in("verify out")[0] == 0


def test_classes_in_a_given_order(call_in: Call) -> None:
    """`--classes` says which label a class has; val packed later has to agree."""
    Path("classes.txt").write_text("b\na\n")
    assert call_in("pack in out --classes classes.txt")[0] == 0
    assert open_splits("out")["val"].manifest.classes == ("b", "a")
    Path("other.txt").write_text("a\nb\n")
    status, _, err = call_in("pack in/val out --classes other.txt")
    assert (status, "packed with other classes" in err) == (2, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pack in out --part 2/2", "part 2/2: parts of 2 are 0 to 1"),
        ("pack in out --part x", "'x' is no part; write for example 0/8"),
        ("pack in out --part slurm", "SLURM_PROCID and SLURM_NTASKS are not set"),
        ("pack in out --check none --resize 9", "check cannot be none"),
        ("pack in out --quality 101", "quality must be in 1..100"),
        ("pack in out --val_labels x.csv", "has class folders, which are its labels"),
        ("pack in out --classes nothing.txt", "nothing.txt"),
        ("seal in out", "there are none"),
    ],
)
def test_wrong_use(call_in: Call, line: str, message: str) -> None:
    """One line that says what is wrong, and nothing is packed."""
    assert_refused(call_in, line, message)
