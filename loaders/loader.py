"""StreamingLoader: what a training loop iterates, and what a checkpoint remembers of it.

    position of the run   t = epoch * batches an epoch + batch        one integer names every batch
    worker k of n makes   t = start + k, start + k + n, start + k + 2n, ...

Workers live for the run. At an epoch's end they run on into the next one, so there is no pause
there; when training goes on elsewhere (a resumed run, an epoch cut short) they are sent there.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from ctypes import c_int64
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from loaders.augment import AugmentConfig, Crops, Draw, random_crops
from loaders.blocks import Blocks
from loaders.decode import decoder_name, get_decoder
from loaders.demand import TrainingDemand
from loaders.order import Lanes, Order, OrderConfig
from loaders.pipeline import Batch, Planned, make_pipeline
from loaders.policy import finish
from loaders.prefetch import CacheConfig, Fetcher, with_cache
from loaders.reader import Facts, Reader, ShardReader
from loaders.sizes import Sizes
from loaders.stats import Clock, Counters, Stats, rates
from loaders.substitutes import KnownBad
from loaders.topology import Topology, check_identity, run_identity
from loaders.workers import Workers, worker_place
from sharding.errors import UsageError
from sharding.process import FROM_SERVER


class StreamingLoader:
    """Training batches of one rank, in an order that depends on seed and epoch alone.

    Iterating yields the rest of the current epoch: from the loaded position if that belongs to
    it, else from its start. `state_dict` counts batches that were delivered, not those that workers
    made ahead; it is the same on every rank.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        order: OrderConfig,
        augment: AugmentConfig,
        topology: Topology,
        size: int | Sizes,
        workers: int,
        prefetch: int = 2,
        decoder: str = "auto",
        epoch_of: Callable[[], int] | None = None,
        cache: CacheConfig | None = None,
        max_bad_samples: int = 0,
    ) -> None:
        """`epoch_of` tells the epoch each time an iteration begins; without it set_epoch does.

        prefetch: batches that each worker makes ahead. cache: for a ShardReader's shards.
        max_bad_samples: of this rank, whose places others may take. Raises UsageError if the data
        set is smaller than one global batch.
        """
        self._order = Order(reader.counts, order)
        self._topology = topology
        self._identity = run_identity(reader, order, topology.global_batch, topology.repeats)
        self._steps = self._order.steps(topology.global_batch)
        self._decoder = decoder_name(decoder)
        self._epoch_of = epoch_of
        self._epoch = 0
        self._delivered = (0, 0)  # epoch, batches of it
        self._start = FROM_SERVER.RawValue(c_int64)
        sizes = Sizes(size=size) if isinstance(size, int) else size
        plan = partial(_plan, self._order, topology, sizes, self._start)
        crops = partial(_crops, augment)
        finishes = augment.policy != "none" or augment.erase_probability > 0
        largest = topology.batch * sizes.largest**2 * 3
        blocks = Blocks(workers=workers, prefetch=prefetch, size=largest)
        self._stats = Stats(max(workers, 1) + 1)
        self._waited = 0.0
        self._samples = 0
        self._then = Clock(time.perf_counter(), 0.0, 0, Counters())
        self._fetcher: Fetcher | None = None
        if cache is not None and isinstance(reader, ShardReader):
            demand = TrainingDemand(
                self._order,
                batch=topology.different,
                rank=topology.rank,
                world=topology.world,
                batches=len(self),
                accumulate=topology.accumulate,
            )
            reader, self._fetcher = with_cache(
                reader, demand, cache, stats=self._stats, row=max(workers, 1)
            )
            self._fetcher.close_with(self)
        pipeline = make_pipeline(
            plan,
            reader,
            crops,
            get_decoder(decoder),
            finish=partial(finish, config=augment) if finishes else None,
            blocks=blocks,
            stats=self._stats,
            known_bad=KnownBad(workers, max_bad_samples) if max_bad_samples else None,
        )
        self._workers = Workers(pipeline, workers=workers, prefetch=prefetch)
        self._workers.close_with(self)
        self._next = -1  # tag of the batch that the workers deliver next

    def __len__(self) -> int:
        """Batches of a whole epoch, also while resuming in its middle."""
        return self._steps * self._topology.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch.

        A generator: the epoch is looked up when the first batch is asked for. Lightning calls
        iter() before it has restored its own epoch counter.
        """
        epoch = self._epoch if self._epoch_of is None else self._epoch_of()
        first = self._delivered[1] if self._delivered[0] == epoch else 0
        for number in range(first, len(self)):
            batch = self._get(epoch * len(self) + number)
            self._delivered = (epoch, number + 1)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: integers and names, the same on every rank."""
        epoch, batches = self._delivered
        return {
            "epoch": epoch,
            "position": batches * self._topology.batch * self._topology.world,
            **self._identity,
            "decoder": self._decoder,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken, on any number of ranks and workers.

        Raises UsageError when data, order or global batch are not those of the state.
        """
        check_identity(state, self._identity)
        if state["decoder"] != self._decoder:
            warnings.warn(
                f"the checkpoint was made with {state['decoder']}, this run decodes with "
                f"{self._decoder}: pixels may differ in the last bits",
                stacklevel=2,
            )
        each = self._topology.batch * self._topology.world
        if state["position"] % each:
            raise UsageError(
                f"cannot resume: position {state['position']} is inside a batch of {each} samples; "
                "use the accumulation of the checkpoint's run"
            )
        self._epoch = state["epoch"]
        self._delivered = (state["epoch"], state["position"] // each)

    def counters(self) -> Counters:
        """What the loader's processes did since it was made."""
        return self._stats.total()

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, for logs: rates, times of an image, shares."""
        now = Clock(time.perf_counter(), self._waited, self._samples, self.counters())
        then, self._then = self._then, now
        return rates(then, now)

    def _get(self, tag: int) -> Batch:
        """The batch of this tag, wherever in the run it is."""
        begin = time.perf_counter()
        if tag != self._next:
            self._start.value = tag
            self._workers.restart()
        self._next = -1  # for the case of an error
        batch = self._workers.next(tag)
        self._next = tag + 1
        if self._fetcher is not None:  # from the first batch on, which has the wire to itself
            self._fetcher.at(tag + 1)
        self._waited += time.perf_counter() - begin
        self._samples += len(batch.labels)
        return batch


def _plan(order: Order, topology: Topology, sizes: Sizes, start: c_int64) -> Iterator[Planned]:
    """A worker's batches from `start` on, without end."""
    lanes = Lanes(order)
    epoch_batches = order.steps(topology.global_batch) * topology.accumulate
    worker, workers = worker_place()
    for tag in count(start.value + worker, workers):
        epoch, batch = divmod(tag, epoch_batches)
        step, piece = divmod(batch, topology.accumulate)
        once = order.part(
            epoch=epoch,
            step=step,
            batch=topology.different,
            rank=topology.rank,
            world=topology.world,
            lanes=lanes,
        )
        here = slice(piece * topology.batch, (piece + 1) * topology.batch)
        numbers = np.tile(once, topology.repeats)[here]
        copies = np.repeat(np.arange(topology.repeats), len(once))[here]
        yield Planned(tag, sizes.at(epoch), Draw(order.config.seed, epoch, numbers, copies))


def _crops(config: AugmentConfig, draw: Draw, facts: Facts) -> Crops:
    return random_crops(draw, facts.widths, facts.heights, config)
