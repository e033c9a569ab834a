"""Re-reads every byte of a packed split against manifest and indexes: what is wrong, and where."""

from collections.abc import Iterator
from functools import partial

import xxhash

from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.process import worker_pool


def verify(split: PackedSplit, *, workers: int) -> Iterator[tuple[int, list[str]]]:
    """Check every shard; yields its number and a line for each thing wrong with it, in order."""
    numbers = range(len(split.manifest.shards))
    with worker_pool(min(workers, len(numbers))) as pool:
        yield from zip(numbers, pool.map(partial(check_shard, split), numbers), strict=True)


def check_shard(split: PackedSplit, number: int) -> list[str]:
    """What is wrong with one shard's tar and index, a line each; an empty list if nothing is."""
    where = split.where(number)
    try:
        index = split.read_index(number)
        blob = split.open_tar(number)
        data = memoryview(blob.read_at(0, blob.size))
    except DataError as error:
        return [str(error)]
    found = xxhash.xxh3_128_hexdigest(data)
    damaged = [
        f"{where}: wrong bytes at offset {row['offset']}, sample {index.key(i)}"
        for i, row in enumerate(index.table)
        if xxhash.xxh3_64_intdigest(data[row["offset"] :][: row["size"]]) != row["xxh3"]
    ]
    if found != split.manifest.shards[number].xxh128 and not damaged:
        return [f"{where}: its headers, labels or padding were changed; all images are whole"]
    return damaged
