"""What a worker does: planned sample numbers -> bytes -> pixels -> whole batches.

Each image is read, checked and decoded while its bytes are in the processor's cache, straight into
its place in the batch. Errors that a user should read travel as values, so that the training
process raises them once, without the tracebacks of two processes around them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

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
    return wds.DataPipeline(plan, partial(_make_batches, reader, crops, decode, size))


def _make_batches(
    reader: Reader, crops: CropFunction, decode: DecodeInto, size: int, plan: Iterable[Planned]
) -> Iterator[Made]:
    for planned in plan:
        try:
            batch: Batch | Exception = _make_batch(reader, crops, decode, size, planned)
        except (DataError, OSError) as error:
            batch = error
        yield Made(planned.tag, batch)


def _make_batch(
    reader: Reader, crops: CropFunction, decode: DecodeInto, size: int, planned: Planned
) -> Batch:
    """Raises DataError, naming the sample, where bytes are not what they should be."""
    numbers = planned.numbers
    facts, early = _with_sizes(reader, numbers)
    boxes, flips, exact = crops(numbers, facts, planned.epoch)
    images = _empty((len(numbers), size, size, 3))
    rows = zip(images.numpy(), numbers.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    for pixels, number, box, flip in rows:
        data = early[number] if number in early else reader.read(number)
        try:
            decode(pixels, data, box, flip, exact)
        except DecodeError as error:
            raise DataError(f"{reader.describe(number)}: cannot be decoded: {error}") from error
    return Batch(images, torch.from_numpy(facts.labels), torch.from_numpy(numbers))


def _with_sizes(reader: Reader, numbers: Integers) -> tuple[Facts, dict[int, bytes]]:
    """The samples' facts, and the bytes of those whose sizes had to be read from their headers."""
    facts = reader.facts(numbers)
    unknown = np.flatnonzero(facts.widths == 0)
    if not len(unknown):
        return facts, {}
    sizes = np.stack([facts.widths, facts.heights])
    early = {}
    for i in unknown.tolist():
        number = int(numbers[i])
        early[number] = reader.read(number)
        try:
            sizes[:, i] = image_size(early[number])
        except DecodeError as error:
            raise DataError(f"{reader.describe(number)}: is no image: {error}") from error
    return Facts(facts.labels, sizes[0], sizes[1]), early


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialized uint8 tensor; in a worker, in memory that the training process can map.

    A tensor in ordinary memory would be copied there when it is handed over.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # As torch's own collate does.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]  # noqa: SLF001
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
