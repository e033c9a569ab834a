"""Carries a plan out: shards written in parallel, crash-safe, and resumable.

Each shard is published whole (tar, then index), the manifest when all are there. A packer that was
killed is started again with the same command: a shard that holds, byte for byte, what the plan
makes of its images is kept, everything else is made again. So the result is that of an
undisturbed run. The lock file stays until the manifest is written; it marks the folder as ours.

The source must not change in between: an image that was replaced by another of the same name and
size is not noticed in a shard that is kept, for a kept shard is not compared with its source.
"""

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sharding import tar
from sharding.errors import DataError, UsageError
from sharding.images import check_header
from sharding.index import SampleIndex
from sharding.manifest import (
    MANIFEST_NAME,
    Manifest,
    Packing,
    Shard,
    SourceCounts,
    index_name,
    tar_name,
)
from sharding.plan import plan_shards
from sharding.process import worker_pool
from sharding.source import Listing
from sharding.store import LocalStore

LOCK_NAME = ".packing"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """All that is needed to write one shard, in whichever process."""

    source: Path
    store: LocalStore
    split: str
    number: int
    paths: list[str]
    labels: list[int]
    sizes: list[int]


def pack(
    listing: Listing,
    store: LocalStore,
    *,
    split: str,
    packing: Packing,
    workers: int,
    progress: Callable[[Shard], None] = lambda shard: None,
) -> Manifest:
    """Pack a listing into shards below `store` and return its manifest; `progress` is told each.

    Raises UsageError when the folder holds something else or another packer is at work,
    DataError for a file that is no image, that changed since it was listed, or that shares its
    key with another one.
    """
    _refuse_shared_keys(listing)
    tasks = [
        ShardTask(
            source=listing.root,
            store=store,
            split=split,
            number=number,
            paths=[listing.paths[i] for i in samples],
            labels=listing.labels[samples].tolist(),
            sizes=listing.sizes[samples].tolist(),
        )
        for number, samples in enumerate(plan_shards(listing.sizes, packing))
    ]
    with _locked(store.root):
        finished = MANIFEST_NAME in store.sizes()
        if not finished:
            store.sweep()
            _remove_strays(store, tasks)
        shards: dict[int, Shard] = {}
        for number, shard in _map(find_shard if finished else make_shard, tasks, workers):
            shards[number] = shard
            progress(shard)
        manifest = Manifest(
            split=split,
            classes=listing.classes,
            source=SourceCounts(found=len(listing), packed=len(listing), rejected=0),
            shards=tuple(shards[task.number] for task in tasks),
            packing=packing,
        )
        text = manifest.to_json().encode()
        if finished and store.read(MANIFEST_NAME) != text:
            raise _other_data_set(store)
        if not finished:
            with store.create(MANIFEST_NAME) as stream:
                stream.write(text)
    return manifest


def make_shard(task: ShardTask) -> tuple[int, Shard]:
    """Keep the shard if it is there and right, else write it."""
    shard = _existing(task)
    return task.number, _write(task) if shard is None else shard


def find_shard(task: ShardTask) -> tuple[int, Shard]:
    """The shard of a finished data set. Raises UsageError if it is not what the plan makes."""
    shard = _existing(task)
    if shard is None:
        raise _other_data_set(task.store)
    return task.number, shard


class _Assembly:
    """The bytes of a shard, one sample after the other, and the rows of its index."""

    def __init__(self, task: ShardTask, images: Iterable[bytes]) -> None:
        self._task = task
        self._images = images
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._keys: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        position = 0
        members = zip(self._task.paths, self._task.labels, self._images, strict=True)
        for path, label, image in members:
            facts = check_header(image, str(self._task.source / path))
            key, extension = tar.member_name(path)
            head, padded = tar.member(f"{key}.{extension}", image)
            label_head, label_padded = tar.member(f"{key}.cls", b"%d" % label)
            at = position + len(head)
            fits = max(facts.width, facts.height) < 1 << 16
            size = (facts.width, facts.height) if fits else (0, 0)
            self._rows.append((at, len(image), label, xxhash.xxh3_64_intdigest(image), *size))
            self._keys.append(key.encode())
            sample = b"".join([head, padded, label_head, label_padded])
            position += len(sample)
            yield sample
        yield tar.END

    def index(self) -> bytes:
        """The index file; complete once the bytes were taken."""
        return SampleIndex.from_rows(self._rows, self._keys).to_bytes()


def _write(task: ShardTask) -> Shard:
    assembly = _Assembly(task, _source_images(task))
    digest = xxhash.xxh3_128()
    size = 0
    name = tar_name(task.split, task.number)
    with task.store.create(name) as stream:
        for chunk in assembly:
            digest.update(chunk)
            size += stream.write(chunk)
    index = assembly.index()
    with task.store.create(index_name(task.split, task.number)) as stream:
        stream.write(index)
    return _shard(task, size, digest.hexdigest(), index)


def _existing(task: ShardTask) -> Shard | None:
    """The shard that stands in the store, if tar and index are what its own images make."""
    try:
        blob = task.store.open(tar_name(task.split, task.number))
        stored_index = task.store.read(index_name(task.split, task.number))
    except FileNotFoundError:
        return None
    position = 0

    def stored_images() -> Iterator[bytes]:
        for path, size in zip(task.paths, task.sizes, strict=True):
            key, extension = tar.member_name(path)
            yield blob.read_at(position + len(tar.header(f"{key}.{extension}", size)), size)

    assembly = _Assembly(task, stored_images())
    digest = xxhash.xxh3_128()
    try:
        for chunk in assembly:
            if blob.read_at(position, len(chunk)) != chunk:
                return None
            digest.update(chunk)
            position += len(chunk)
    except DataError:  # shorter than it should be, or no image where one should be
        return None
    if position != blob.size or assembly.index() != stored_index:
        return None
    return _shard(task, position, digest.hexdigest(), stored_index)


def _shard(task: ShardTask, size: int, xxh128: str, index: bytes) -> Shard:
    return Shard(
        url=tar_name(task.split, task.number),
        bytes=size,
        samples=len(task.paths),
        xxh128=xxh128,
        index_xxh128=xxhash.xxh3_128_hexdigest(index),
    )


def _source_images(task: ShardTask) -> Iterator[bytes]:
    for path, size in zip(task.paths, task.sizes, strict=True):
        if size >= 1 << 32:
            raise DataError(f"{task.source / path} has {size} bytes; an image's limit is 4 GiB")
        try:
            data = (task.source / path).read_bytes()
        except FileNotFoundError:
            data = b""
        if len(data) != size or not data:
            raise DataError(
                f"{task.source / path} is empty or changed while packing ({size} bytes listed, "
                f"{len(data)} read); repair or remove it and start again"
            )
        yield data


def _map(
    work: Callable[[ShardTask], tuple[int, Shard]], tasks: list[ShardTask], workers: int
) -> Iterator[tuple[int, Shard]]:
    """Results in the order in which they are done. After an error the shards begun are finished."""
    if workers <= 1:
        yield from map(work, tasks)
        return
    with worker_pool(min(workers, len(tasks))) as pool:
        for future in as_completed([pool.submit(work, task) for task in tasks]):
            yield future.result()


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the folder's lock. Its file is removed once there is a manifest, else left as a mark."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / LOCK_NAME
    ours = path.exists() or (root / MANIFEST_NAME).exists()
    if not ours and any(name.suffix in {".tar", ".npy"} for name in root.iterdir()):
        raise UsageError(
            f"{root} holds .tar or .npy files that were not packed here; choose an empty folder"
        )
    with open(path, "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UsageError(
                f"another packer is at work on {root}: {lock.read().decode() or 'just started'}"
            ) from error
        if not path.exists():  # the other one finished between our open and our lock
            raise UsageError(f"another packer has just finished {root}")
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        lock.flush()
        try:
            yield
        finally:
            if (root / MANIFEST_NAME).exists():
                path.unlink()


def _remove_strays(store: LocalStore, tasks: list[ShardTask]) -> None:
    """Remove shards of an earlier, unfinished plan that this plan has no place for."""
    planned = {name(t.split, t.number) for t in tasks for name in (tar_name, index_name)}
    for name in store.sizes().keys() - planned:
        if re.fullmatch(rf"{re.escape(tasks[0].split)}-\d{{6}}\.(tar|npy)", name):
            store.delete(name)


def _refuse_shared_keys(listing: Listing) -> None:
    first_with: dict[str, str] = {}
    for path in listing.paths:
        stem = path.rpartition(".")[0]
        other = first_with.setdefault(stem, path)
        if other is not path:
            raise DataError(
                f"{other} and {path} in {listing.root} would share the key {stem!r}; rename one"
            )


def _other_data_set(store: LocalStore) -> UsageError:
    return UsageError(
        f"{store.url} holds a finished data set that these images and options do not make, or a "
        f"damaged one (`shard.py verify` tells). Choose another folder, or remove its "
        f"{MANIFEST_NAME} to pack it again"
    )
