"""The loaders that a training loop iterates: StreamingLoader to train, ValidationLoader to evaluate.

    position of the run   t = epoch * batches an epoch + batch        one integer names every batch
    worker k of n makes   t = start + k, start + k + n, start + k + 2n, ...

Workers live for the run. At an epoch's end they run on into the next one, so there is no pause
there; when training goes on elsewhere (a resumed run, an epoch cut short) they are sent there.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from loaders.augment import AugmentConfig, Crops, centre_crops, random_crops
from loaders.decode import decoder_name
from loaders.order import Lanes, Order, OrderConfig, validation_batches
from loaders.pipeline import Batch, CropFunction, Made, Planned, make_pipeline
from loaders.reader import Facts, Reader
from sharding.errors import UsageError
from sharding.manifest import ORDER_VERSION
from sharding.process import FORK, worker_process
from sharding.streams import Integers


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Which part of each global batch a rank delivers, and in how many pieces."""

    global_batch: int
    """Samples of one optimizer step, over all ranks."""
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    """Batches that a rank delivers for one optimizer step."""

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.global_batch % (self.world * self.accumulate):
            raise UsageError(
                f"the global batch of {self.global_batch} is not divisible by {self.world} "
                f"processes x {self.accumulate} accumulated batches"
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not in 0..{self.world - 1}")

    @property
    def batch(self) -> int:
        """Samples in each batch that a rank delivers."""
        return self.global_batch // (self.world * self.accumulate)


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
        size: int,
        workers: int,
        prefetch: int = 2,
        epoch_of: Callable[[], int] | None = None,
    ) -> None:
        """`epoch_of` tells the epoch each time an iteration begins; without it set_epoch does.

        prefetch: batches that each worker makes ahead. Raises UsageError if the data set is
        smaller than one global batch.
        """
        self._order = Order(reader.counts, order)
        self._topology = topology
        self._digest = reader.digest
        self._steps = self._order.steps(topology.global_batch)
        if self._steps == 0:
            raise UsageError(
                f"the data set's {self._order.samples} samples are fewer than one global batch of "
                f"{topology.global_batch}"
            )
        self._epoch_of = epoch_of or (lambda: self._set_epoch)
        self._set_epoch = 0
        self._delivered = (0, 0)  # epoch, batches of it
        self._start: Synchronized[int] = FORK.Value("q", 0)
        plan = _TrainingPlan(self._order, topology, self._start)
        crops = partial(_training_crops, augment, order.seed)
        self._made = _worker_loader(
            wds_pipeline=make_pipeline(plan, reader, crops, size=size),
            workers=workers,
            prefetch=prefetch,
        )
        self._stream: Iterator[Made] | None = None
        self._next = -1  # tag of the batch that the stream yields next

    def __len__(self) -> int:
        """Batches of a whole epoch, also while resuming in its middle."""
        return self._steps * self._topology.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self._set_epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch.

        A generator: the epoch is looked up when the first batch is asked for. Lightning calls
        iter() before it has restored its own epoch counter.
        """
        epoch = self._epoch_of()
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
            **self._identity(),
            "decoder": decoder_name(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken, on any number of ranks and workers.

        Raises UsageError when data, order or global batch are not those of the state.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise UsageError(
                    f"cannot resume: the checkpoint's {name} is {state.get(name)}, this run's is "
                    f"{mine}. Resume with the same data, seed, lanes, window and global batch, or "
                    "start a new run."
                )
        if state["decoder"] != decoder_name():
            warnings.warn(
                f"the checkpoint was made with {state['decoder']}, this run decodes with "
                f"{decoder_name()}: pixels may differ in the last bits",
                stacklevel=2,
            )
        each = self._topology.batch * self._topology.world
        if state["position"] % each:
            raise UsageError(
                f"cannot resume: position {state['position']} is inside a batch of {each} samples; "
                "use the accumulation of the checkpoint's run"
            )
        self._delivered = (state["epoch"], state["position"] // each)

    def _identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "digest": self._digest,
            "global_batch": self._topology.global_batch,
            **asdict(self._order.config),
        }

    def _get(self, tag: int) -> Batch:
        """The batch of this tag: the stream's next one, or the first of a stream sent there."""
        if self._stream is None or self._next != tag:
            self._start.value = tag
            self._stream = iter(self._made)
        made = next(self._stream)
        self._next = tag + 1
        assert made.tag == tag, f"asked for batch {tag}, got {made.tag}"
        if isinstance(made.batch, Exception):
            self._stream = None
            raise made.batch
        return made.batch


class ValidationLoader:
    """Every sample of a split once, over all ranks; nothing padded, nothing left out."""

    def __init__(
        self,
        reader: Reader,
        *,
        batch: int,
        rank: int,
        world: int,
        resize: int,
        size: int,
        workers: int,
        prefetch: int = 2,
    ) -> None:
        """batch: samples of a rank's batch. resize, size: shorter side and centre crop in pixels."""
        self.samples = sum(reader.counts)
        self._batches = validation_batches(self.samples, batch=batch, rank=rank, world=world)
        plan = _ValidationPlan(self._batches, batch, self.samples)
        crops = partial(_validation_crops, resize, size)
        self._made = _worker_loader(
            wds_pipeline=make_pipeline(plan, reader, crops, size=size),
            workers=min(workers, len(self._batches)),
            prefetch=prefetch,
        )

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        for made in self._made:
            if isinstance(made.batch, Exception):
                raise made.batch
            yield made.batch


class _TrainingPlan:
    """A worker's batches from `start` on, without end."""

    def __init__(self, order: Order, topology: Topology, start: "Synchronized[int]") -> None:
        self._order = order
        self._topology = topology
        self._start = start

    def __iter__(self) -> Iterator[Planned]:
        topology, lanes = self._topology, Lanes(self._order)
        steps = self._order.steps(topology.global_batch)
        worker, workers = _worker()
        tag = self._start.value + worker
        while True:
            epoch, batch = divmod(tag, steps * topology.accumulate)
            step, piece = divmod(batch, topology.accumulate)
            numbers = self._order.part(
                epoch=epoch,
                step=step,
                batch=topology.global_batch,
                rank=topology.rank,
                world=topology.world,
                lanes=lanes,
            )
            mine = numbers[piece * topology.batch : (piece + 1) * topology.batch]
            yield Planned(tag, epoch, mine)
            tag += workers


class _ValidationPlan:
    """A worker's share of the rank's batches."""

    def __init__(self, batches: range, batch: int, samples: int) -> None:
        self._batches = batches
        self._batch = batch
        self._samples = samples

    def __iter__(self) -> Iterator[Planned]:
        worker, workers = _worker()
        for number in self._batches[worker::workers]:
            first = number * self._batch
            yield Planned(number, 0, np.arange(first, min(first + self._batch, self._samples)))


def _training_crops(
    config: AugmentConfig, seed: int, numbers: Integers, facts: Facts, epoch: int
) -> Crops:
    return random_crops(numbers, facts.widths, facts.heights, config, seed=seed, epoch=epoch)


def _validation_crops(resize: int, size: int, numbers: Integers, facts: Facts, epoch: int) -> Crops:
    del numbers, epoch  # the same in every epoch
    return centre_crops(facts.widths, facts.heights, resize=resize, size=size)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _worker_loader(*, wds_pipeline: wds.DataPipeline, workers: int, prefetch: int) -> wds.WebLoader:
    """Run the pipeline in worker processes, or in this process for 0 workers."""
    parallel: dict[str, Any] = {}
    if workers:
        parallel = {
            "multiprocessing_context": FORK,
            "persistent_workers": True,
            "prefetch_factor": prefetch,
            "worker_init_fn": partial(_start_worker, os.getpid()),
        }
    return wds.WebLoader(
        wds_pipeline,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each start would draw from the global one
        **parallel,
    )


def _start_worker(parent: int, worker: int) -> None:
    del worker
    worker_process(parent)


def _as_it_is(made: Made) -> Made:
    return made
