"""Random bits that are a function of who asks: (seed, purpose, epoch, item).

numpy promises the same bits for ever only for its BitGenerators, so raw Philox output is used with
an explicit 128-bit key, integer arithmetic and stable sorts; never Generator's methods.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the order: never reuse or change one."""

    PACK = 1  # the packer's shuffle of all samples
    DEAL = 2  # shards to lanes, once for a run
    SEGMENTS = 3  # order of a lane's segments in an epoch
    SAMPLES = 4  # order of the samples inside a segment
    JITTER = 5  # mixing of neighbouring segments
    AUGMENT = 6  # crops and flips
    VERIFY = 7  # which samples a check of a part of them reads
    POLICY = 8  # augmentation policies, which draw their numbers themselves
    ERASE = 9  # rectangles that are erased


def raw(
    count: int, *, seed: int, purpose: Purpose, epoch: int = 0, item: int = 0
) -> npt.NDArray[np.uint64]:
    """`count` uniform 64-bit words of the stream that these four integers name."""
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 24 and 0 <= item < 1 << 32):
        raise ValueError(
            f"seed {seed}, epoch {epoch} and item {item} must be in 0..2^64-1, 0..2^24-1, 0..2^32-1"
        )
    key = np.array([seed, purpose << 56 | epoch << 32 | item], np.uint64)
    words: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return words


def permutation(
    count: int, *, seed: int, purpose: Purpose, epoch: int = 0, item: int = 0
) -> Integers:
    """A permutation of 0..count-1 (int64), drawn from the stream."""
    return np.argsort(raw(count, seed=seed, purpose=purpose, epoch=epoch, item=item), kind="stable")
