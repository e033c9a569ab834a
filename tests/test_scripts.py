"""The scripts that make small data sets."""

from pathlib import Path

import pytest
from PIL import Image

from scripts import make_demo_dataset, make_tiny_subset
from sharding.source import scan
from tests.make_images import files_below


def test_the_demo_data_set_is_an_image_folder_of_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,797 digits in two splits and ten classes; a folder in use is refused."""
    folder = str(tmp_path / "digits")
    assert make_demo_dataset.main([folder, "--size", "24"]) == 0
    splits = {name: scan(tmp_path / "digits" / name) for name in ("train", "val")}
    assert {name: len(listing) for name, listing in splits.items()} == {"train": 1438, "val": 359}
    assert splits["train"].classes == splits["val"].classes
    assert len(splits["train"].classes) == 10
    with Image.open(tmp_path / "digits" / "train" / splits["train"].paths[0]) as image:
        assert (image.format, image.size) == ("JPEG", (24, 24))
    assert make_demo_dataset.main([folder]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_tiny_subset_is_the_first_images_of_the_first_classes(
    small_images: Path, tmp_path: Path
) -> None:
    """N classes, M training images each, a tenth as many to validate; bytes as they were."""
    target = tmp_path / "tiny"
    arguments = [str(small_images), str(target), "--classes", "2", "--images", "3"]
    assert make_tiny_subset.main(arguments) == 0
    found = files_below(target)
    assert sorted(found) == [
        "train/a/a_0.JPEG",
        "train/a/a_1.JPEG",
        "train/a/a_10.JPEG",
        "train/b/b_0.JPEG",
        "train/b/b_1.JPEG",
        "train/b/b_10.JPEG",
        "val/a/a_0.JPEG",
        "val/b/b_0.JPEG",
    ]
    assert all(data == (small_images / name).read_bytes() for name, data in found.items())


def test_more_classes_than_there_are_is_refused(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says how many there are."""
    assert make_tiny_subset.main([str(small_images), str(tmp_path / "x"), "--classes", "4"]) == 2
    assert "has only 3 classes" in capsys.readouterr().err
