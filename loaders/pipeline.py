"""What a worker does: planned sample numbers -> bytes -> pixels -> whole batches.

Each image is read, checked and decoded while its bytes are in the processor's cache, straight into
its place in the batch. Errors that a user should read travel as values, so that the training
process raises them once, without the tracebacks of two processes around them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from loaders.augment import Crops, Draw
from loaders.blocks import Blocks
from loaders.decode import DecodeError, DecodeInto, image_size
from loaders.readahead import Read, ReadAhead
from loaders.reader import BadSampleError, Facts, Reader
from loaders.stats import Counters, Stats
from loaders.substitutes import KnownBad, Substitutes
from sharding.errors import DataError, UsageError
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
    size: int
    """Pixels of its images' sides."""
    draw: Draw
    """Which samples, and whose random numbers they have."""


def _received(images: torch.Tensor, labels: Integers, numbers: Integers) -> Batch:
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(numbers))


class Made(NamedTuple):
    """A batch, or the error in its place."""

    tag: int
    batch: Batch | Exception


CropFunction = Callable[[Draw, Facts], Crops]
"""(samples, their facts with known sizes) -> crops"""
Finish = Callable[[npt.NDArray[np.uint8], Draw], None]
"""(a batch's pixels, samples): what is done to the pixels in the end, in their place"""


def make_pipeline(
    plan: Callable[[], Iterator[Planned]],
    reader: Reader,
    crops: CropFunction,
    decode: DecodeInto,
    *,
    finish: Finish | None = None,
    blocks: Blocks,
    stats: Stats,
    known_bad: KnownBad | None = None,
) -> wds.DataPipeline:
    """The pipeline that makes each planned batch, in order; yields Made.

    known_bad: bad samples that others take the place of; without it the first one is an error.
    """
    memory = partial(_memory, blocks)
    make = partial(
        _make_batch, reader=reader, crops=crops, decode=decode, finish=finish, memory=memory
    )
    if known_bad is not None:
        make = partial(_make_good, make, reader, Substitutes(reader, known_bad))
    return wds.DataPipeline(plan, partial(_make_batches, make, reader, stats))


def _make_batches(
    make: Callable[[Planned, Read], tuple[Batch, Counters]],
    reader: Reader,
    stats: Stats,
    plan: Iterable[Planned],
) -> Iterator[Made]:
    row = _row()
    before = (reader.cached, *reader.network())
    for planned, read in ReadAhead(reader).batches(plan, lambda planned: planned.draw.numbers):
        try:
            batch, counters = make(planned, read)
        except (DataError, UsageError, OSError) as error:  # UsageError: a store that refuses
            yield Made(planned.tag, error)
            continue
        now = (reader.cached, *reader.network())
        cached, requests, retries = (n - b for n, b in zip(now, before, strict=True))
        before = now
        stats.add(row, counters._replace(cached=cached, requests=requests, retries=retries))
        yield Made(planned.tag, batch)


def _make_good(
    make: Callable[[Planned, Read], tuple[Batch, Counters]],
    reader: Reader,
    substitutes: Substitutes,
    planned: Planned,
    read: Read,
) -> tuple[Batch, Counters]:
    """The batch, with others in the place of its bad samples as far as that is allowed.

    Bad ones are rare, so for each the whole batch is made again. Raises what `replace` does.
    """
    numbers = planned.draw.numbers
    begun = frozenset(numbers.tolist())
    replaced = 0
    while True:
        draw = planned.draw._replace(numbers=numbers)
        try:
            batch, counters = make(
                planned._replace(draw=draw),
                lambda number: read(number) if number in begun else reader.read(number),
            )
            return batch, counters._replace(substituted=replaced)
        except BadSampleError as bad:
            # Its frames hold the memory of the batch that failed, and `read` may keep the error.
            numbers = substitutes.replace(numbers, bad.with_traceback(None), row=_row())
            replaced += 1


def _make_batch(
    planned: Planned,
    read: Read,
    *,
    reader: Reader,
    crops: CropFunction,
    decode: DecodeInto,
    finish: Finish | None,
    memory: Callable[[int, int], torch.Tensor],
) -> tuple[Batch, Counters]:
    """Raises BadSampleError where bytes are not what they should be."""
    numbers = planned.draw.numbers
    begin = time.perf_counter()
    facts, early = _with_sizes(reader, read, numbers)
    boxes, flips, exact = crops(planned.draw, facts)
    images = memory(len(numbers), planned.size)
    batch = images.numpy()
    rows = zip(batch, numbers.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    read_bytes, read_s = 0, 0.0
    for pixels, number, box, flip in rows:
        before = time.perf_counter()
        data = early[number] if number in early else read(number)
        read_s += time.perf_counter() - before
        read_bytes += len(data)
        try:
            decode(pixels, data, box, flip, exact)
        except DecodeError as error:
            what = f"{reader.describe(number)}: cannot be decoded: {error}"
            raise BadSampleError(what, number) from error
    if finish is not None:
        finish(batch, planned.draw)
    counters = Counters(
        samples=len(numbers),
        read_bytes=read_bytes,
        read_s=read_s,
        decode_s=time.perf_counter() - begin - read_s,
    )
    return Batch(images, torch.from_numpy(facts.labels), torch.from_numpy(numbers)), counters


def _with_sizes(reader: Reader, read: Read, numbers: Integers) -> tuple[Facts, dict[int, bytes]]:
    """The samples' facts, and the bytes of those whose sizes had to be read from their headers."""
    facts = reader.facts(numbers)
    unknown = np.flatnonzero(facts.widths == 0)
    if not len(unknown):
        return facts, {}
    sizes = np.stack([facts.widths, facts.heights])
    early = {}
    for i in unknown.tolist():
        number = int(numbers[i])
        early[number] = read(number)
        try:
            sizes[:, i] = image_size(early[number])
        except DecodeError as error:
            what = f"{reader.describe(number)}: is no image: {error}"
            raise BadSampleError(what, number) from error
    return Facts(facts.labels, sizes[0], sizes[1]), early


def _row() -> int:
    """Of this process's counters."""
    worker = get_worker_info()
    return 0 if worker is None else worker.id


def _memory(blocks: Blocks, samples: int, size: int) -> torch.Tensor:
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
