"""Pipeline: planned sample numbers become whole batches, and failures become values."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders.augment import AugmentConfig, Crops, Draw, random_crops
from loaders.blocks import Blocks
from loaders.decode import get_decoder
from loaders.pipeline import Batch, Made, Planned, make_pipeline
from loaders.reader import Facts, Reader, ShardReader
from loaders.stats import Stats
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.manifest import Packing
from sharding.streams import Integers
from tests.make_shards import assert_equal, data_set, encode, open_images, open_shards, picture


def crops(draw: Draw, facts: Facts) -> Crops:
    """Training's crops."""
    return random_crops(draw, facts.widths, facts.heights, AugmentConfig())


def drawn(numbers: list[int], epoch: int = 0) -> Draw:
    """These samples, each once."""
    return Draw(0, epoch, np.array(numbers), np.zeros(len(numbers), np.int64))


def run(reader: Reader, *batches: list[int], epoch: int = 0) -> list[Made]:
    """What the pipeline makes of these batches; tags count from 100."""

    def plan() -> Iterator[Planned]:
        for tag, numbers in enumerate(batches, 100):
            yield Planned(tag, 12, drawn(numbers, epoch))

    blocks = Blocks(workers=0, prefetch=0, size=0)
    pipeline = make_pipeline(
        plan, reader, crops, get_decoder("auto"), blocks=blocks, stats=Stats(1)
    )
    return list(pipeline)


def test_batches_hold_what_was_planned() -> None:
    """Images, labels and numbers of each batch stand in the planned order, pixel by pixel."""
    reader = open_shards()
    planned = [[5, 3, 40], [7]]
    for tag, (made, numbers) in enumerate(zip(run(reader, *planned), planned, strict=True), 100):
        assert made.tag == tag
        assert isinstance(made.batch, Batch)
        images, labels, found = made.batch
        assert found.tolist() == numbers
        facts = reader.facts(np.array(numbers))
        assert labels.tolist() == facts.labels.tolist()
        boxes, flips, exact = crops(drawn(numbers), facts)
        assert (images.dtype, labels.dtype, found.dtype) == (torch.uint8, torch.int64, torch.int64)
        for image, number, box, flip in zip(images, numbers, boxes, flips, strict=True):
            pixels = np.empty((12, 12, 3), np.uint8)
            get_decoder("auto")(pixels, reader.read(number), tuple(box), flip, exact)
            assert np.array_equal(image, pixels)


class Forgetful(ShardReader):
    """Knows the size of every other sample only."""

    def facts(self, numbers: Integers) -> Facts:
        """See Reader."""
        labels, widths, heights = super().facts(numbers)
        return Facts(labels, widths * (numbers % 2), heights * (numbers % 2))


def test_unknown_sizes_are_read_from_the_images() -> None:
    """Where the index lacks a size, the image's header gives it and the pixels are the same."""
    split = PackedSplit.open(str(data_set() / "shards/train"))
    known, unknown = (run(kind(split), [*range(9)])[0].batch for kind in (ShardReader, Forgetful))
    assert isinstance(known, Batch)
    assert isinstance(unknown, Batch)
    assert_equal([unknown], [known])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(picture(0, 60, 50))[:-300], "cannot be decoded: "),
        (b"no image at all", "is no image: "),
    ],
)
def test_a_failure_stands_in_its_batchs_place(tmp_path: Path, data: bytes, message: str) -> None:
    """A bad image makes its batch a DataError that names it; the batches around it are made."""
    for number in range(4):
        (tmp_path / "train/ant").mkdir(parents=True, exist_ok=True)
        good = encode(picture(number, 60, 50))
        (tmp_path / f"train/ant/{number}.jpg").write_bytes(data if number == 2 else good)
    reader = open_images(tmp_path, Packing())
    bad = next(number for number in range(4) if reader.key(number) == "ant/2")
    others = [number for number in range(4) if number != bad]
    before, failed, after = run(reader, others, [others[0], bad], others)
    assert_equal([after.batch], [before.batch])  # type: ignore[list-item]
    assert isinstance(failed.batch, DataError)
    assert failed.tag == 101
    assert str(failed.batch).startswith(f"{tmp_path}/train/ant/2.jpg: {message}")
