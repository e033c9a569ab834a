"""ImageNetData: a recipe's data section becomes the loaders of a trainer's rank."""

import shutil
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest

from loaders.datamodule import DataConfig, ImageNetData
from sharding.errors import DataError
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore
from tests.make_shards import (
    GLOBAL_BATCH,
    ORDER,
    PACKING,
    SAMPLES,
    STEPS,
    assert_equal,
    copy_of_shards,
    data_set,
    make_loader,
)


def make(root: Path, *, accumulate: int = 1, **options: Any) -> ImageNetData:
    """The data module of a folder, for 6 images of 16 x 16 pixels a batch."""
    options |= {"lanes": ORDER.lanes, "window": ORDER.window, "packing": PACKING}
    config = DataConfig(root=str(root), train_size=16, val_resize=20, val_size=16, **options)
    return ImageNetData(config, seed=ORDER.seed, batch_size=6, accumulate=accumulate)


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("shards", {"num_workers": 0}),
        ("shards", {"num_workers": 2, "prefetch": 1}),
        ("images", {"num_workers": 0, "format": "imagefolder"}),
    ],
)
def test_loaders_follow_the_trainer(folder: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Training is the trainer's epoch of the loader, validation is every sample once."""
    data = make(data_set() / folder, accumulate=2, **options)
    data.trainer = lightning.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert data.steps(GLOBAL_BATCH) == STEPS
    train, expected = data.train_dataloader(), make_loader(accumulate=2)
    for epoch in (0, 3):
        data.trainer.fit_loop.epoch_progress.current.completed = epoch
        expected.set_epoch(epoch)
        assert_equal(list(train), list(expected))
    val = data.val_dataloader()
    numbers = [n for batch in val for n in batch.numbers.tolist()]
    assert numbers == [*range(SAMPLES["val"])]
    assert data.train.classes == data.val.classes == ("ant", "bee", "cat")


def without_val_bees(tmp_path: Path) -> Path:
    """An ImageFolder whose validation split lacks a class that training has."""
    root = shutil.copytree(data_set() / "images", tmp_path / "images")
    shutil.rmtree(root / "val/bee")
    return root


def test_a_class_may_be_missing_from_validation(tmp_path: Path) -> None:
    """In an ImageFolder, labels of validation are training's, also where a class has no image."""
    data = make(without_val_bees(tmp_path), format="imagefolder")
    assert data.val.classes == data.train.classes
    assert set(data.val.facts(np.arange(7)).labels.tolist()) == {0, 2}


def test_splits_of_different_data_are_refused(tmp_path: Path) -> None:
    """Shards whose train and val were packed with different classes are refused at the start."""
    root = copy_of_shards(tmp_path)
    shutil.rmtree(root / "val")
    listing = scan(without_val_bees(tmp_path) / "val")
    store = LocalStore(root / "val")
    pack(Job(listing=listing, store=store, split="val", packing=PACKING), workers=1)
    with pytest.raises(DataError, match=r"train and val have different classes \(3 and 2\)"):
        make(root)


def test_an_unfinished_copy_is_found_at_the_start(tmp_path: Path) -> None:
    """A data set that lacks a tar is refused before anything is read from it."""
    root = copy_of_shards(tmp_path)
    (root / "train/train-000006.tar").unlink()
    with pytest.raises(DataError, match=r"train-000006\.tar is missing"):
        make(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tar"}, "format must be one of shards, imagefolder, got 'tar'"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"prefetch": 0}, "prefetch at least 1"),
        ({"train_size": 0}, "sizes must be positive"),
        ({"val_size": 300}, "val_size at most val_resize"),
        ({"val_size": 0}, "sizes must be positive"),
        ({"lanes": 0}, "lanes must be in"),
        ({"window": 0}, "window must be in"),
    ],
)
def test_config_is_checked(options: dict[str, Any], message: str) -> None:
    """Values behind a range's end are refused with the rule."""
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
