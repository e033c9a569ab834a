"""What a worker does: planned sample numbers -> bytes -> pixels -> whole batches.

Each image is read, checked and decoded while its bytes are in the processor's cache, straight into
its place in the batch. Errors that a user should read travel as values, so that the training
process raises them once, without the tracebacks of two processes around them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from loaders.augment import Crops
from loaders.blocks import Blocks
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

    def __reduce__(self) -> tuple[Any, ...]:
        # As bytes: a tensor would make a shared block, and a socket's round trip, for 1 kB.
        return _received, (self.images, self.labels.numpy(), self.numbers.numpy())


class Planned(NamedTuple):
    """One batch to be made."""

    tag: int
    """Says which batch this is; comes back with it."""
    epoch: int
    numbers: Integers


def _received(images: torch.Tensor, labels: Integers, numbers: Integers) -> Batch:
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(numbers))


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
    blocks: Blocks,
) -> wds.DataPipeline:
    """The pipeline that makes each planned batch, in order, of size x size pixels; yields Made."""
    make = partial(_make_batch, reader, crops, decode, partial(_memory, blocks, size))
    return wds.DataPipeline(plan, partial(_make_batches, make))


def _make_batches(make: Callable[[Planned], Batch], plan: Iterable[Planned]) -> Iterator[Made]:
    for planned in plan:
        try:
            batch: Batch | Exception = make(planned)
        except (DataError, OSError) as error:
            batch = error
        yield Made(planned.tag, batch)


def _make_batch(
    reader: Reader,
    crops: CropFunction,
    decode: DecodeInto,
    memory: Callable[[int], torch.Tensor],
    planned: Planned,
) -> Batch:
    """Raises DataError, naming the sample, where bytes are not what they should be."""
    numbers = planned.numbers
    facts, early = _with_sizes(reader, numbers)
    boxes, flips, exact = crops(numbers, facts, planned.epoch)
    images = memory(len(numbers))
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


def _memory(blocks: Blocks, size: int, samples: int) -> torch.Tensor:
    """Uninitialized pixels; in a worker, in memory that the training process maps too."""
    shape = (samples, size, size, 3)
    worker = get_worker_info()
    if worker is None:
        return torch.empty(shape, dtype=torch.uint8)
    if lent := blocks.take(worker.id, shape):
        return cast(torch.Tensor, lent)  # which it is when it arrives
    # As torch's own collate does.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]  # noqa: SLF001
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
