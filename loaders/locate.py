"""Where the samples of one training step stand: shard and bytes, for each rank."""

from functools import lru_cache
from typing import NamedTuple

from loaders.order import Order
from sharding.dataset import PackedSplit
from sharding.errors import UsageError


class Place(NamedTuple):
    """A sample of a rank, and its image's bytes in a tar."""

    rank: int
    shard: str
    """As the manifest has it: beside it, or a URL."""
    offset: int
    size: int
    key: str


def places(
    split: PackedSplit,
    order: Order,
    *,
    epoch: int,
    step: int,
    global_batch: int,
    world: int,
    most: int | None = None,
) -> list[Place]:
    """Each rank's samples of a step of an epoch, the first `most` of each in the batch's order.

    Reads the indexes of their shards alone. Raises UsageError for a step that the epoch does not
    have, or a batch that the ranks cannot share.
    """
    steps = order.steps(global_batch)
    if step >= steps:
        raise UsageError(f"there is no step {step}: an epoch has {steps} steps, 0 to {steps - 1}")
    if global_batch % world:
        raise UsageError(f"a global batch of {global_batch} is not divisible by {world} ranks")
    read_index = lru_cache(split.read_index)
    found = []
    for rank in range(world):
        numbers = order.part(epoch=epoch, step=step, batch=global_batch, rank=rank, world=world)
        for number in numbers[:most].tolist():
            shard, row = order.place(number)
            index = read_index(shard)
            found.append(
                Place(
                    rank=rank,
                    shard=split.manifest.shards[shard].url,
                    offset=int(index.table["offset"][row]),
                    size=int(index.table["size"][row]),
                    key=index.key(row),
                )
            )
    return found
