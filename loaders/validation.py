"""ValidationLoader: every sample of a split exactly once over all ranks.

    7 batches, 3 ranks      rank 0: 0 1     rank 1: 2 3     rank 2: 4 5 6

Nothing is padded and nothing is dropped; the last batch may be smaller.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from loaders.augment import Crops, Draw, centre_crops
from loaders.blocks import Blocks
from loaders.decode import get_decoder
from loaders.demand import ValidationDemand
from loaders.pipeline import Batch, Planned, make_pipeline
from loaders.prefetch import CacheConfig, Fetcher, with_cache
from loaders.reader import Facts, Reader, ShardReader
from loaders.stats import Stats
from loaders.workers import Workers, worker_place


def validation_batches(samples: int, *, batch: int, rank: int, world: int) -> range:
    """PURE: numbers of the batches that a rank takes: contiguous, uneven by at most one.

    Batch i holds samples i * batch to min((i + 1) * batch, samples) - 1.
    """
    total = -(-samples // batch)
    return range(total * rank // world, total * (rank + 1) // world)


class ValidationLoader:
    """The validation batches of one rank."""

    def __init__(
        self,
        reader: Reader,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        resize: int,
        size: int,
        workers: int,
        prefetch: int = 2,
        decoder: str = "auto",
        interpolation: str = "bilinear",
        cache: CacheConfig | None = None,
    ) -> None:
        """batch: samples of a rank's batch. resize, size: shorter side, centre crop, in pixels.

        interpolation: bilinear or bicubic, both antialiased.
        """
        samples = sum(reader.counts)
        self._batches = validation_batches(samples, batch=batch, rank=rank, world=world)
        plan = partial(_plan, self._batches, batch, samples, size)
        crops = partial(_crops, resize, size)
        workers = min(workers, len(self._batches))
        stats = Stats(max(workers, 1) + 1)
        self._fetcher: Fetcher | None = None
        if cache is not None and isinstance(reader, ShardReader) and self._batches:
            demand = ValidationDemand(
                reader.counts,
                first=self._batches.start * batch,
                last=min(self._batches.stop * batch, samples),
                batch=batch,
            )
            reader, self._fetcher = with_cache(
                reader, demand, cache, stats=stats, row=max(workers, 1)
            )
            self._fetcher.close_with(self)
        blocks = Blocks(workers=workers, prefetch=prefetch, size=batch * size * size * 3)
        pipeline = make_pipeline(
            plan,
            reader,
            crops,
            get_decoder(decoder, interpolation),
            blocks=blocks,
            stats=stats,
        )
        self._workers = Workers(pipeline, workers=workers, prefetch=prefetch)
        self._workers.close_with(self)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches. A generator, so that it keeps the loader and its workers."""
        self._workers.restart()
        for tag in self._batches:
            batch = self._workers.next(tag)
            if self._fetcher is not None:
                self._fetcher.at(tag)
            yield batch


def _plan(batches: range, batch: int, samples: int, size: int) -> Iterator[Planned]:
    """A worker's share of its rank's batches."""
    worker, workers = worker_place()
    for number in batches[worker::workers]:
        first = number * batch
        numbers = np.arange(first, min(first + batch, samples))
        yield Planned(number, size, Draw(0, 0, numbers, np.zeros_like(numbers)))


def _crops(resize: int, size: int, draw: Draw, facts: Facts) -> Crops:
    del draw  # the same for each sample in every epoch
    return centre_crops(facts.widths, facts.heights, resize=resize, size=size)
