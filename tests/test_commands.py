"""The commands that adopt, check, copy and give back: what users type and read."""

from pathlib import Path

import pytest
import webdataset as wds

from sharding.dataset import open_splits
from tests.conftest import Call, assert_refused
from tests.make_images import files_below, image


def test_there_and_back(call_in: Call) -> None:
    """Packed, checked, unpacked: the same files. A second unpacking does not touch the first."""
    assert call_in("pack in out --max_samples 4")[0] == 0
    status, out, err = call_in("unpack out back")
    assert (status, err) == (0, "")
    assert out == "train: 16 images in back/train\nval: 3 images in back/val\n"
    assert files_below(Path("back")) == files_below(Path("in"))
    status, _, err = call_in("unpack out back")
    assert (status, err.count("\n")) == (2, 1)
    assert files_below(Path("back")) == files_below(Path("in"))


def test_verify_counts_what_is_damaged(call_in: Call) -> None:
    """What could not be read is not said to have been."""
    call_in("pack in out --max_samples 4")
    assert "train: 16 samples in 4 shards, all 0.0 MB read\n" in call_in("verify out")[1]
    Path("out/train/train-000001.tar").unlink()
    status, out, err = call_in("verify out")
    assert (status, err.count("\n")) == (3, 2)
    assert out == (
        "train: 16 samples in 4 shards, 1 of them damaged\n"
        "val: 3 samples in 1 shard, all 0.0 MB read\n"
    )


def test_verify_a_share(call_in: Call) -> None:
    """A share reads every index and some samples; what it finds wrong has status 3."""
    call_in("pack in out --max_samples 4")
    status, out, _ = call_in("verify out --sample 50%")
    assert status == 0
    assert "train: 16 samples in 4 shards, all indexes and 50.00% of the samples read" in out
    for path in Path("out/train").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(image(0), bytes(len(image(0)))))
    status, _, err = call_in("verify out --sample 100%")
    assert status == 3
    assert "a/a_0" in err
    assert err.endswith("shard.py: error: out: 1 problem, see above\n")


def test_adopting(call_in: Call) -> None:
    """Tars of others get an index and a manifest, stay where they are, and read as our own do."""
    call_in("pack in out --max_samples 4")
    status, out, err = call_in(
        "index out/train/train-{000000..000003}.tar other --window 2 --lanes 2"
    )
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
    assert call_in("verify other")[0] == 0
    assert "none: shards of others" in call_in("info other")[1]


@pytest.mark.parametrize("in_order", [True, False])
def test_sorted_shards_get_a_warning(call_in: Call, in_order: bool) -> None:
    """Classes that stand one behind the other: a warning says what batches will look like."""
    for number in range(8):
        with wds.TarWriter(f"{number}.tar") as writer:
            for sample in range(40):
                label = number if in_order else sample % 8
                writer.write({"__key__": f"{number}-{sample}", "jpg": image(sample), "cls": label})
    status, _, err = call_in("index {0..7}.tar out --lanes 1 --window 4")
    assert status == 0
    assert err.startswith("warning: ") == in_order
    assert ("unpack" in err) == in_order


@pytest.mark.parametrize(
    ("line", "message"),
    [
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
def test_wrong_use(call_in: Call, line: str, message: str) -> None:
    """One line that says what is wrong, and nothing is packed."""
    assert_refused(call_in, line, message)
