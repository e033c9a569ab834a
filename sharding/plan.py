"""PURE: which sample stands in which shard, and in which order."""

import numpy as np

from sharding.manifest import Packing
from sharding.streams import Integers, Purpose, permutation
from sharding.tar import BLOCK

# What a sample takes beside its image: two headers and the label's own block.
_OVERHEAD_BYTES = 3 * BLOCK


def stored_bytes(sizes: Integers) -> Integers:
    """What each image of so many bytes takes in a tar, with its label."""
    return (sizes + BLOCK - 1) // BLOCK * BLOCK + _OVERHEAD_BYTES


def plan_shards(sizes: Integers, packing: Packing) -> list[Integers]:
    """Shuffle all samples with the packing's seed and cut them into shards.

        sizes      100 100 100 100 100        seed 0, room for two samples a shard
        shuffled     3   0   4   1   2
        shards     [ 3   0 ][ 4   1 ][ 2 ]

    `sizes` are the images' bytes. Returns for each shard the numbers of its samples (int64), in
    tar order; every sample is in exactly one. A shard takes samples until the next one would
    pass `shard_bytes` (rounded to tar blocks) or `max_samples`; it takes at least one.
    """
    order = permutation(len(sizes), seed=packing.seed, purpose=Purpose.PACK)
    ends = np.cumsum(stored_bytes(sizes[order]))
    shards = []
    first = 0
    while first < len(order):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + packing.shard_bytes, "right"))
        if packing.max_samples is not None:
            last = min(last, first + packing.max_samples)
        last = max(last, first + 1)
        shards.append(order[first:last])
        first = last
    return shards
