"""What a worker does: planned sample numbers -> bytes -> pixels -> whole batches.

Three stages of a webdataset DataPipeline. Errors that a user should read travel as values, so that
the training process raises them once, without the tracebacks of two processes around them.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds

from loaders.augment import Crops
from loaders.decode import DecodeError, DecodeInto, image_size
from loaders.reader import Facts, Reader
from sharding.errors import DataError
from sharding.streams import Integers


class Batch(NamedTuple):
    """What training gets."""

    images: torch.Tensor
    """(N, height, width, 3) uint8"""
    labels: torch.Tensor
    """(N,) int64"""
    numbers: torch.Tensor
    """(N,) int64: the samples' numbers in the data set"""


class Planned(NamedTuple):
    """One batch to be made."""

    tag: int
    """Says which batch this is; comes back with it."""
    epoch: int
    numbers: Integers


class Made(NamedTuple):
    """A batch, or the error in its place."""

    tag: int
    batch: Batch | Exception


class _Fetched(NamedTuple):
    planned: Planned
    facts: Facts
    images: list[bytes]


CropFunction = Callable[[Integers, Facts, int], Crops]
"""(sample numbers, their facts with known sizes, epoch) -> crops"""


def make_pipeline(
    plan: Callable[[], Iterator[Planned]],
    reader: Reader,
    crops: CropFunction,
    decode: DecodeInto,
    *,
    size: int,
) -> wds.DataPipeline:
    """The pipeline that makes each planned batch, in order, of size x size pixels; yields Made."""
    return wds.DataPipeline(
        plan, partial(_fetch, reader), partial(_decode, reader, crops, decode, size)
    )


def _fetch(reader: Reader, plan: Iterable[Planned]) -> Iterator[_Fetched | Made]:
    """Read and check the bytes of each planned batch."""
    for planned in plan:
        try:
            images = [reader.read(number) for number in planned.numbers.tolist()]
            yield _Fetched(planned, _with_sizes(reader, planned.numbers, images), images)
        except (DataError, OSError) as error:
            yield Made(planned.tag, error)


def _decode(
    reader: Reader,
    crops: CropFunction,
    decode: DecodeInto,
    size: int,
    fetched: Iterable[_Fetched | Made],
) -> Iterator[Made]:
    """Decode each image of a batch straight into the batch's array."""
    for item in fetched:
        if isinstance(item, Made):
            yield item
            continue
        planned, facts, images = item
        boxes, flips, exact = crops(planned.numbers, facts, planned.epoch)
        pixels = np.empty((len(images), size, size, 3), np.uint8)
        try:
            for i, (data, box, flip) in enumerate(
                zip(images, boxes.tolist(), flips.tolist(), strict=True)
            ):
                decode(pixels[i], data, box, flip, exact)
        except DecodeError as error:
            place = reader.describe(int(planned.numbers[i]))
            yield Made(planned.tag, DataError(f"{place}: cannot be decoded: {error}"))
            continue
        batch = Batch(*map(torch.from_numpy, (pixels, facts.labels, planned.numbers)))
        yield Made(planned.tag, batch)


def _with_sizes(reader: Reader, numbers: Integers, images: list[bytes]) -> Facts:
    """The samples' facts, with sizes that the index lacks read from the images' headers."""
    facts = reader.facts(numbers)
    unknown = np.flatnonzero(facts.widths == 0)
    if not len(unknown):
        return facts
    sizes = np.stack([facts.widths, facts.heights])
    for i in unknown.tolist():
        try:
            sizes[:, i] = image_size(images[i])
        except DecodeError as error:
            raise DataError(f"{reader.describe(int(numbers[i]))}: is no image: {error}") from error
    return Facts(facts.labels, sizes[0], sizes[1])
