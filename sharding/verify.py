"""Re-reads a packed split against manifest and indexes: what is wrong, and where."""

import math
from collections.abc import Iterator
from functools import partial

import xxhash

from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
from sharding.index import SampleIndex
from sharding.process import worker_pool
from sharding.store import Blob
from sharding.streams import Purpose, permutation

_PIECE = 1 << 20  # stays in a core's cache between reading and hashing


def verify(
    split: PackedSplit, *, workers: int, share: float = 1.0, seed: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Check every shard; yields its number and a line for each thing wrong with it, in order.

    With a `share` below 1 only that share of each shard's samples is read, at least one, drawn by
    the seed; indexes and sizes are always checked, labels, headers and padding then are not.
    """
    if not 0 < share <= 1:
        raise UsageError(f"the share of samples to check must be above 0 and up to 1, got {share}")
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"seed must be in 0..2^64-1, got {seed}")
    numbers = range(len(split.manifest.shards))
    check = partial(check_shard, split, share=share, seed=seed)
    with worker_pool(min(workers, len(numbers))) as pool:
        yield from zip(numbers, pool.map(check, numbers), strict=True)


def check_shard(split: PackedSplit, number: int, *, share: float = 1.0, seed: int = 0) -> list[str]:
    """What is wrong with one shard's tar and index, a line each; an empty list if nothing is.

    A whole tar is read once, in pieces; sample by sample again only if its hash is wrong.
    """
    where = split.where(number)
    try:
        index = split.read_index(number)
        blob = split.open_tar(number)
        if share < 1:
            order = permutation(len(index), seed=seed, purpose=Purpose.VERIFY, item=number)
            rows = sorted(order[: math.ceil(share * len(index))].tolist())
            return list(_damaged(where, index, blob, rows))
        whole = _hash(xxhash.xxh3_128(), blob, 0, blob.size).hexdigest()
        if whole == split.manifest.shards[number].xxh128:
            return []
        damaged = list(_damaged(where, index, blob, list(range(len(index)))))
    except DataError as error:
        return [str(error)]
    return damaged or [
        f"{where}: its headers, labels or padding were changed; all images are whole"
    ]


def _damaged(where: str, index: SampleIndex, blob: Blob, rows: list[int]) -> Iterator[str]:
    for row in rows:
        offset, size, _, xxh3 = index.table[row].tolist()[:4]
        if _hash(xxhash.xxh3_64(), blob, offset, size).intdigest() != xxh3:
            yield f"{where}: wrong bytes at offset {offset}, sample {index.key(row)}"


def _hash(digest: "xxhash._Hasher", blob: Blob, offset: int, size: int) -> "xxhash._Hasher":
    end = offset + size
    for start in range(offset, end, _PIECE):
        digest.update(blob.read_at(start, min(_PIECE, end - start)))
    return digest
