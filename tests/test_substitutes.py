"""Bad samples that others take the place of: which, the same everywhere, no more than allowed."""

import gc
import re
import shutil
from itertools import accumulate
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loaders.augment import AugmentConfig
from loaders.datamodule import DataConfig, ImageNetData
from loaders.loader import StreamingLoader
from loaders.reader import Reader, ShardReader
from loaders.substitutes import next_of_shard
from loaders.topology import Topology
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from tests.make_shards import (
    GLOBAL_BATCH,
    ORDER,
    assert_equal,
    copy_of_shards,
    data_set,
    global_batches,
    open_images,
    open_shards,
)
from tests.test_pipeline import Forgetful

PREFETCH = 2


class Remote(ShardReader):
    """One whose reads threads do ahead, as those from an object store."""

    def __init__(self, split: PackedSplit) -> None:
        super().__init__(split)
        self.remote = True


def damage(root: Path, numbers: list[int], split: str = "train") -> ShardReader:
    """Change a byte of these samples' images; the reader of what is left."""
    reader = open_shards(root, split)
    starts = [0, *accumulate(reader.counts)]
    for number in numbers:
        shard = int(np.searchsorted(starts, number, "right")) - 1
        offset = int(reader.split.read_index(shard).table["offset"][number - starts[shard]])
        path = root / split / reader.split.manifest.shards[shard].url
        data = bytearray(path.read_bytes())
        data[offset + 20] ^= 1
        path.write_bytes(data)
    return open_shards(root, split)


def loaders(
    reader: Reader, most: int, *, world: int = 1, workers: int = 0, repeats: int = 1, size: int = 16
) -> list[StreamingLoader]:
    """Of all ranks."""
    return [
        StreamingLoader(
            reader,
            order=ORDER,
            augment=AugmentConfig(policy="randaugment", erase_probability=0.5),
            topology=Topology(global_batch=GLOBAL_BATCH, rank=rank, world=world, repeats=repeats),
            size=size,
            workers=workers,
            prefetch=PREFETCH,
            max_bad_samples=most,
        )
        for rank in range(world)
    ]


def train(loader: StreamingLoader, epochs: int) -> None:
    """Take all batches."""
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        list(loader)


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
def test_the_next_ones_are_all_of_the_shard(counts: list[int], data: st.DataObject) -> None:
    """In turn, and then from the first on; no other shard is touched."""
    starts = [0, *accumulate(counts)]
    shard = data.draw(st.integers(0, len(counts) - 1))
    number = first = data.draw(st.integers(starts[shard], starts[shard + 1] - 1))
    seen = []
    for _ in range(counts[shard]):
        number = next_of_shard(counts, number)
        seen.append(number)
    assert sorted(seen) == [*range(starts[shard], starts[shard + 1])]
    assert number == first


@pytest.mark.parametrize(
    ("kind", "world", "workers", "repeats"),
    [
        (ShardReader, 1, 0, 1),
        (ShardReader, 3, 0, 2),
        (Remote, 1, 0, 2),
        (Remote, 2, 1, 1),
    ],
)
def test_the_neighbour_takes_the_place(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    kind: type[ShardReader],
    world: int,
    workers: int,
    repeats: int,
) -> None:
    """On any number of processes; all other samples are what they were, pixel by pixel."""
    reader = kind(damage(copy_of_shards(tmp_path), [3, 4, 20]).split)  # 7 in a shard: 3, 4, 5 ...
    takes = {3: 5, 4: 5, 20: 14}  # 20 is the last one of its shard
    whole = loaders(open_shards(), 0, repeats=repeats)
    found = loaders(reader, 100, world=world, workers=workers, repeats=repeats)
    replaced = 0
    for epoch in range(3):
        for loader in (*whole, *found):
            loader.set_epoch(epoch)
        for batch, clean in zip(global_batches(found), global_batches(whole), strict=True):
            if repeats == 1 or world == 1:  # else copies stand in another order
                expected = [takes.get(number, number) for number in clean.numbers.tolist()]
                assert batch.numbers.tolist() == expected
                same = batch.numbers == clean.numbers
                assert batch.images[same].equal(clean.images[same])
            assert not {3, 4, 20} & set(batch.numbers.tolist())
            facts = reader.facts(batch.numbers.numpy())
            assert batch.labels.tolist() == facts.labels.tolist()
            replaced += len(set(clean.numbers.tolist()) & takes.keys())
    # More where 4 was tried first, or workers are ahead.
    counted = sum(loader.counters().substituted for loader in found)
    assert counted >= replaced > 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if workers else counted)  # workers have a stderr of their own
    for line in lines:
        assert re.fullmatch(
            r"warning: .*train-\d+.tar, offset \d+, sample \w+/\w+: the bytes were changed .* "
            r"sample \w+/\w+ takes its place \([123] of 100 that data.max_bad_samples allows\)",
            line,
        )


def test_a_substitute_is_what_it_is_in_its_own_place(tmp_path: Path) -> None:
    """The same crop, policy and erasing as where it was drawn itself, in that epoch."""
    reader = damage(copy_of_shards(tmp_path), [20])
    (loader,) = loaders(reader, 100)
    own: dict[tuple[int, int], torch.Tensor] = {}
    twice = 0
    for epoch in range(4):
        loader.set_epoch(epoch)
        pictures = [
            (number, image)
            for batch in loader
            for number, image in zip(batch.numbers.tolist(), batch.images, strict=True)
            if number == 14
        ]
        for number, image in pictures:
            twice += (epoch, number) in own
            assert own.setdefault((epoch, number), image).equal(image)
    assert twice


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_sample_is_counted_once_and_its_places_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repeats: int
) -> None:
    """One bad image does not end a long run, and a batch in which it stands twice is made once."""
    reader = damage(copy_of_shards(tmp_path), [20])
    (loader,) = loaders(reader, 1, repeats=repeats)
    (whole,) = loaders(open_shards(), 0, repeats=repeats)
    batches = 0
    for epoch in range(12):
        for one in (loader, whole):
            one.set_epoch(epoch)
        batches += sum(20 in batch.numbers.tolist() for batch in whole)
        list(loader)
    assert loader.counters().substituted == batches > 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == batches
    assert all(line.endswith("(1 of 1 that data.max_bad_samples allows)") for line in lines)


@pytest.mark.parametrize(
    ("kind", "workers"), [(ShardReader, 0), (Forgetful, 0), (Remote, 0), (Remote, 2)]
)
def test_no_more_are_replaced_than_are_allowed(tmp_path: Path, kind: type, workers: int) -> None:
    """The workers of a rank share the allowance. One more ends the run, and is named."""
    damage(copy_of_shards(tmp_path), [4, 9, 41])  # of two workers one meets 9 and 4, the other 41
    reader = kind(PackedSplit.open(str(tmp_path / "shards/train")))
    for most in (2,) if workers else (0, 1, 2):
        (loader,) = loaders(reader, most, workers=workers)
        with pytest.raises(DataError, match=r"train-\d+.tar, offset \d+, sample .* bytes were"):
            train(loader, epochs=1)
    (loader,) = loaders(reader, 3, workers=workers)
    train(loader, epochs=2)


def test_nothing_is_kept_of_a_batch_that_failed(tmp_path: Path) -> None:
    """Reads ahead keep their errors, but not with them the memory that was being filled."""
    damage(copy_of_shards(tmp_path), [0, 1, 2, 3, 20])
    (loader,) = loaders(Remote(PackedSplit.open(str(tmp_path / "shards/train"))), 9, size=18)
    gc.collect()
    gc.disable()  # a block is given back with its last reference, not some time later
    try:
        before = batches_of_pixels(18)
        train(loader, epochs=9)
        kept = batches_of_pixels(18) - before
    finally:
        gc.enable()
    assert loader.counters().substituted > 9
    assert kept <= 1  # the last one


def batches_of_pixels(size: int) -> int:
    """Tensors of batches of this size that this process holds."""
    shape = (GLOBAL_BATCH, size, size, 3)
    return sum(type(one) is torch.Tensor and one.shape == shape for one in gc.get_objects())


def test_a_shard_that_is_gone_is_no_bad_sample(tmp_path: Path) -> None:
    """It ends the run at once; nobody wants a line for each of its samples."""
    root = copy_of_shards(tmp_path)
    (root / "train/train-000002.tar").unlink()
    (loader,) = loaders(open_shards(root), 100)
    with pytest.raises(DataError, match=r"train-000002\.tar is missing"):
        list(loader)
    assert loader.counters().substituted == 0


def test_a_shard_without_a_good_sample_ends_the_run(tmp_path: Path) -> None:
    """However large the allowance is: nothing turns in a circle for ever."""
    reader = damage(copy_of_shards(tmp_path), [*range(7)])
    (loader,) = loaders(reader, 50)
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        list(loader)


def test_files_that_are_gone_are_replaced(tmp_path: Path) -> None:
    """Of an ImageFolder, where each sample is a file of its own."""
    shutil.copytree(data_set() / "images", tmp_path / "images")
    reader = open_images(tmp_path / "images")
    Path(reader.describe(3)).unlink()
    path = Path(reader.describe(20))
    path.unlink()
    path.mkdir()
    (loader,) = loaders(reader, 2)
    train(loader, epochs=2)
    assert loader.counters().substituted > 1


@pytest.mark.parametrize("junk", [b"no image", b"\xff\xd8\xff\xe0"])
def test_undecodable_files_are_replaced_too(tmp_path: Path, junk: bytes) -> None:
    """Of an ImageFolder: its reader counts by the shards that would be packed of it."""
    shutil.copytree(data_set() / "images", tmp_path / "images")
    key = open_shards().key(20)
    (path,) = (tmp_path / "images/train").glob(f"{key}.*")
    path.write_bytes(junk.ljust(path.stat().st_size, b"\0"))
    expected = loaders(damage(copy_of_shards(tmp_path), [20]), 9)
    found = loaders(open_images(tmp_path / "images"), 9)
    assert_equal(global_batches(found), global_batches(expected))
    assert found[0].counters().substituted == 1
    (strict,) = loaders(open_images(tmp_path / "images"), 0)
    with pytest.raises(DataError, match=f"{path.name}.*: is no image"):
        list(strict)


def test_validation_replaces_nothing(tmp_path: Path) -> None:
    """There every image counts once, so a bad one is an error, whatever training may do."""
    damage(copy_of_shards(tmp_path), [5], "val")
    data = ImageNetData(
        DataConfig(root=str(tmp_path / "shards"), num_workers=0, max_bad_samples=9),
        seed=0,
        batch_size=6,
    )
    data.trainer = lightning.Trainer(logger=False)
    with pytest.raises(DataError, match="the bytes were changed"):
        list(data.val_dataloader())
