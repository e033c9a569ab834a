"""The commands that make, adopt, check and give back: what users type and read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

import shard
from sharding.dataset import open_splits
from tests.make_images import files_below, image, image_folder, write_files

Call = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Runs shard.py with this line in a folder with an ImageFolder `in`; status and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["shard.py"])
    image_folder(tmp_path / "in/train", {"a": 9, "b": 7})
    image_folder(tmp_path / "in/val", {"b": 3}, first=50)

    def run(line: str) -> tuple[int, str, str]:
        status = shard.main([*line.split(), *(["--workers", "1"] if "info" not in line else [])])
        return (status, *capsys.readouterr())

    return run


def test_there_and_back(call: Call) -> None:
    """Packed, checked, unpacked: the same files. A second unpacking does not touch the first."""
    assert call("pack in out --max_samples 4")[0] == 0
    status, out, err = call("unpack out back")
    assert (status, err) == (0, "")
    assert out == "train: 16 images in back/train\nval: 3 images in back/val\n"
    assert files_below(Path("back")) == files_below(Path("in"))
    status, _, err = call("unpack out back")
    assert (status, err.count("\n")) == (2, 1)
    assert files_below(Path("back")) == files_below(Path("in"))


def test_training_needs_both_splits(call: Call) -> None:
    """Who packs one split alone is told what is left to pack, until it is packed."""
    left = "next: out has no val/ yet, which train.py needs: shard.py pack SRC/val\n"
    assert call("pack in/train out")[1].endswith(f" JPEG)\n{left}")
    assert left not in call("pack in/val out")[1]
    assert left not in call("pack in/train out")[1]
    assert "has no val" not in call("pack in/val other")[1]


def test_verify_counts_what_is_damaged(call: Call) -> None:
    """What could not be read is not said to have been."""
    call("pack in out --max_samples 4")
    assert "train: 16 samples in 4 shards, all 0.0 MB read\n" in call("verify out")[1]
    Path("out/train/train-000001.tar").unlink()
    status, out, err = call("verify out")
    assert (status, err.count("\n")) == (3, 2)
    assert out == (
        "train: 16 samples in 4 shards, 1 of them damaged\n"
        "val: 3 samples in 1 shards, all 0.0 MB read\n"
    )


def test_verify_a_share(call: Call) -> None:
    """A share reads every index and some samples; what it finds wrong has status 3."""
    call("pack in out --max_samples 4")
    status, out, _ = call("verify out --sample 50%")
    assert status == 0
    assert "train: 16 samples in 4 shards, all indexes and 50.00% of the samples read" in out
    for path in Path("out/train").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(image(0), bytes(len(image(0)))))
    status, _, err = call("verify out --sample 100%")
    assert status == 3
    assert "a/a_0" in err
    assert err.endswith("shard.py: error: out: 1 problem(s), see above\n")


def test_rejects_are_said_and_listed(call: Call) -> None:
    """Skipped images: counts that add up, a warning that names the list."""
    write_files(Path("in/train"), {"a/zero.jpg": b"", "b/text.png": b"hello"})
    status, out, err = call("pack in out --on_bad skip")
    assert status == 0
    assert "train: 18 images found = 16 packed + 2 rejected (0 other files ignored)" in out
    assert err == "warning: the 2 rejected images are listed in out/train/rejected.jsonl\n"
    lines = Path("out/train/rejected.jsonl").read_text().splitlines()
    rejected = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert rejected.keys() == {"a/zero.jpg", "b/text.png"}
    assert rejected["a/zero.jpg"] == "is empty"
    assert json.loads(call("info out --json")[1])[0]["images_rejected"] == 2
    assert call("verify out")[0] == 0


def test_adopting(call: Call) -> None:
    """Tars of others get an index and a manifest, stay where they are, and read as our own do."""
    call("pack in out --max_samples 4")
    status, out, err = call("index out/train/train-{000000..000003}.tar other --window 2 --lanes 2")
    assert (status, err) == (0, "")
    assert out == (
        "train: 16 samples in 4 shards, 2 classes (0 other files passed over); index and manifest "
        "in other/train\n"
    )
    assert not list(Path("other/train").glob("*.tar"))
    ours, theirs = (open_splits(url)["train"] for url in ("out", "other"))
    for number in range(4):
        one, other = (split.read_index(number).table for split in (ours, theirs))
        assert one.tolist() == other.tolist()
    assert call("verify other")[0] == 0
    assert "none: shards of others" in call("info other")[1]


@pytest.mark.parametrize("in_order", [True, False])
def test_sorted_shards_get_a_warning(call: Call, in_order: bool) -> None:
    """Classes that stand one behind the other: a warning says what batches will look like."""
    for number in range(8):
        with wds.TarWriter(f"{number}.tar") as writer:
            for sample in range(40):
                label = number if in_order else sample % 8
                writer.write({"__key__": f"{number}-{sample}", "jpg": image(sample), "cls": label})
    status, _, err = call("index {0..7}.tar out --lanes 1 --window 4")
    assert status == 0
    assert err.startswith("warning: ") == in_order
    assert ("unpack" in err) == in_order


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
        ("index nothing-{0..3}.tar out", "nothing-0.tar is missing"),
        (
            "index in out",
            "in is missing or a folder; name tars: 'folder/name-{000..999}.tar' stands",
        ),
        (
            "index *.tar out",
            "*.tar is missing or a folder; name tars: 'folder/name-{000..999}.tar'",
        ),
    ],
)
def test_wrong_use(call: Call, line: str, message: str) -> None:
    """One line that says what is wrong, status 2 or 3, and nothing is packed."""
    status, _, err = call(line)
    assert status in {2, 3}
    assert message in err
    assert err.count("\n") == 1
    assert not list(Path().glob("out/**/*.tar"))


def test_slurm_says_the_part(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--part slurm` is this task of the step; in all they are the whole."""
    for task in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(task))
        monkeypatch.setenv("SLURM_NTASKS", "2")
        assert f"part {task} of 2" in call("pack in out --max_samples 2 --part slurm")[1]
    assert call("seal in out --max_samples 2")[0] == 0
    assert call("verify out")[0] == 0


def test_classes_in_a_given_order(call: Call) -> None:
    """`--classes` says which label a class has; val packed later has to agree."""
    Path("classes.txt").write_text("b\na\n")
    assert call("pack in out --classes classes.txt")[0] == 0
    assert open_splits("out")["val"].manifest.classes == ("b", "a")
    Path("other.txt").write_text("a\nb\n")
    status, _, err = call("pack in/val out --classes other.txt")
    assert (status, "packed with other classes" in err) == (2, True)
