"""Copies a packed split from one store to another: checked on the way, resumable, in parallel."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import xxhash

from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
from sharding.executors import open_map
from sharding.manifest import MANIFEST_NAME, Manifest, Shard, tar_name
from sharding.store import Blob, Store

_PIECE = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTask:
    """One shard to be copied, in whichever process."""

    split: PackedSplit
    number: int
    target: Store


def copy(
    split: PackedSplit,
    target: Store,
    *,
    workers: int,
    progress: Callable[[Shard], None] = lambda _: None,
) -> Manifest:
    """Copy shards, indexes and last the manifest; `progress` is told each shard.

    What is there already, and has the manifest's hash, is kept, so that a copy that was killed
    goes on. Shards that others made get names of ours. Bytes that are not the manifest's never get
    their name in the target. Raises UsageError if another data set is there, DataError for damage.
    """
    manifest = _renamed(split.manifest)
    text = manifest.to_json().encode()
    if MANIFEST_NAME in target.sizes():
        found = Manifest.from_json(target.read(MANIFEST_NAME), where=f"{target.url}/manifest.json")
        if found.digest != manifest.digest:
            raise UsageError(
                f"{target.url} holds another data set ({found.digest}, not {manifest.digest}); "
                "choose another place"
            )
    tasks = [
        CopyTask(split=split, number=number, target=target)
        for number in range(len(manifest.shards))
    ]
    with open_map(workers=min(workers, len(tasks))) as map_:
        for shard in map_(copy_shard, tasks):
            progress(shard)
    with target.create(MANIFEST_NAME) as stream:
        stream.write(text)
    return manifest


def copy_shard(task: CopyTask) -> Shard:
    """Copy one shard's tar and index, unless they are there."""
    split, number, target = task.split, task.number, task.target
    shard = split.manifest.shards[number]
    name = tar_name(split.manifest.split, number)
    if not _is_there(target, name, shard.xxh128):
        blob = split.open_tar(number)
        _put(target, name, _pieces(blob), shard.xxh128, split.where(number))
    index_name = split.manifest.index_name(number)
    if not _is_there(target, index_name, shard.index_xxh128):
        where = f"{split.store.url}/{index_name}"
        _put(target, index_name, [split.store.read(index_name)], shard.index_xxh128, where)
    return shard


def _put(target: Store, name: str, pieces: Iterable[bytes], xxh128: str, where: str) -> None:
    digest = xxhash.xxh3_128()
    with target.create(name) as stream:
        for piece in pieces:
            digest.update(piece)
            stream.write(piece)
        if digest.hexdigest() != xxh128:  # inside the block: what is wrong never gets the name
            raise DataError(
                f"{where} was changed or damaged (XXH3-128 {digest.hexdigest()}, the manifest says "
                f"{xxh128}); `shard.py verify` tells where"
            )


def _is_there(target: Store, name: str, xxh128: str) -> bool:
    try:
        blob = target.open(name)
    except FileNotFoundError:
        return False
    digest = xxhash.xxh3_128()
    for piece in _pieces(blob):
        digest.update(piece)
    return digest.hexdigest() == xxh128


def _pieces(blob: Blob) -> Iterator[bytes]:
    for at in range(0, blob.size, _PIECE):
        yield blob.read_at(at, min(_PIECE, blob.size - at))


def _renamed(manifest: Manifest) -> Manifest:
    """The manifest with its shards beside it, under names of ours."""
    shards = tuple(
        replace(shard, url=tar_name(manifest.split, number))
        for number, shard in enumerate(manifest.shards)
    )
    return replace(manifest, shards=shards)
