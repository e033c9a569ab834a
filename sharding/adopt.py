"""Adopts tars that others made: writes index and manifest for them, and leaves them where they are.

Which members make up a sample, groups.py says. Each tar is read once, in pieces.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from sharding.errors import DataError, UsageError
from sharding.groups import read_samples
from sharding.index import SampleIndex
from sharding.manifest import MANIFEST_NAME, Manifest, Shard, SourceCounts, index_name
from sharding.process import worker_pool
from sharding.store import Blob, Store, locate
from sharding.urls import refuse_twice

CLASSES_LIMIT = 1 << 20
"""Classes without given names: one label must not make billions of names."""

_PIECE = 1 << 22

Progress = Callable[[Shard, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptTask:
    """All that is needed to index one tar, in whichever process."""

    store: Store
    url: str
    index_name: str
    labels: int
    """A label is below this."""
    label_key: str
    write: bool
    """Whether the index is stored, or only made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptedShard:
    """What one tar holds."""

    shard: Shard
    largest_label: int
    kinds: Counter[str]
    """Its images by format."""
    passed_over: int


def adopt(
    urls: list[str],
    store: Store,
    *,
    split: str,
    classes: tuple[str, ...] | None,
    label_key: str,
    workers: int,
    progress: Progress = lambda shard, passed_over: None,
) -> Manifest:
    """Index these tars, in this order, into `store`; `progress` is told each, and its other files.

    `classes` are the names in label order; without them "0", "1", ... up to the largest label.
    `label_key` is the label's key in a sample's JSON. A manifest that is there already is left
    alone, and so are its indexes.

    Raises UsageError when that manifest is another, DataError for a tar that is not wholly what it
    should be, or that comes twice.
    """
    if not urls:
        raise UsageError("there are no tars to adopt; give at least one")
    places = [_place(store, url) for url in urls]
    refuse_twice(places)
    finished = MANIFEST_NAME in store.sizes()
    tasks = [
        AdoptTask(
            store=store,
            url=url,
            index_name=index_name(split, number),
            labels=CLASSES_LIMIT if classes is None else len(classes),
            label_key=label_key,
            write=not finished,
        )
        for number, url in enumerate(places)
    ]
    found: dict[str, AdoptedShard] = {}
    with worker_pool(min(workers, len(tasks))) as pool:
        for adopted in pool.map(adopt_shard, tasks):
            other = found.setdefault(adopted.shard.xxh128, adopted)
            if other is not adopted:
                raise DataError(
                    f"{other.shard.url} and {adopted.shard.url} hold the same bytes; adopt one"
                )
            progress(adopted.shard, adopted.passed_over)
    samples = sum(adopted.shard.samples for adopted in found.values())
    kinds = sum((adopted.kinds for adopted in found.values()), Counter[str]())
    if classes is None:
        largest = max(adopted.largest_label for adopted in found.values())
        classes = tuple(map(str, range(largest + 1)))
    manifest = Manifest(
        split=split,
        classes=classes,
        source=SourceCounts(
            found=samples, packed=samples, rejected=0, kinds=dict(sorted(kinds.items()))
        ),
        shards=tuple(adopted.shard for adopted in found.values()),
        packing=None,
    )
    _publish(manifest, store, finished=finished)
    return manifest


def adopt_shard(task: AdoptTask) -> AdoptedShard:
    """Read one tar, and write its index."""
    base, name = locate(task.store, task.url)
    where = f"{base.url}/{name}"
    try:
        blob = _HashedPass(base.open(name))
        blob.read_at(0, min(1, blob.size))  # a folder can be opened, but not read
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(
            f"{where} is missing or a folder; name tars: 'folder/name-{{000..999}}.tar' stands for "
            "a thousand, and nothing else is expanded"
        ) from error
    found = read_samples(blob, where, labels=task.labels, label_key=task.label_key)
    index = SampleIndex.from_rows(found.rows, found.keys).to_bytes()
    if task.write:
        with task.store.create(task.index_name) as stream:
            stream.write(index)
    return AdoptedShard(
        shard=Shard(
            url=task.url,
            bytes=blob.size,
            samples=len(found.rows),
            xxh128=blob.hexdigest(),
            index_xxh128=xxhash.xxh3_128_hexdigest(index),
        ),
        largest_label=max(row[2] for row in found.rows),
        kinds=found.kinds,
        passed_over=found.passed_over,
    )


class _HashedPass:
    """A blob that is read once from front to back; what was passed over is read and hashed too."""

    def __init__(self, blob: Blob) -> None:
        self.size = blob.size
        self._blob = blob
        self._digest = xxhash.xxh3_128()
        self._data = b""
        self._end = 0  # of the data, in the blob

    def read_at(self, offset: int, size: int) -> bytes:
        """See Blob; `offset` must not be lower than that of the read before."""
        while self._end < offset:
            self._data = self._take(0)
        at = offset - self._end + len(self._data)
        assert at >= 0
        missing = offset + size - self._end
        if missing > 0:
            self._data = self._data[at:] + self._take(missing)
            at = 0
        return self._data[at : at + size]

    def hexdigest(self) -> str:
        """XXH3-128 of the whole blob."""
        self.read_at(self.size, 0)
        return self._digest.hexdigest()

    def _take(self, size: int) -> bytes:
        """The next bytes: at least `size`, and a piece where there are so many."""
        data = self._blob.read_at(self._end, max(size, min(_PIECE, self.size - self._end)))
        self._end += len(data)
        self._digest.update(data)
        return data


def _place(store: Store, url: str) -> str:
    """What the manifest says of a tar: its name if it stands beside it, else its absolute URL."""
    url = url.removeprefix("file://")
    if "://" not in url and url:
        url = os.path.abspath(url)
    folder, _, name = url.rpartition("/")
    if not name or name.startswith("."):
        raise UsageError(f"{url!r} names no tar, or a hidden one; rename it")
    if "://" in store.url or "://" in folder:
        beside = folder == store.url.rstrip("/")
    else:
        beside = os.path.realpath(folder) == os.path.realpath(store.url)
    return name if beside else url


def _publish(manifest: Manifest, store: Store, *, finished: bool) -> None:
    text = manifest.to_json().encode()
    if not finished:
        with store.create(MANIFEST_NAME) as stream:
            stream.write(text)
    elif store.read(MANIFEST_NAME) != text:
        raise UsageError(
            f"{store.url} holds a finished data set that these tars and options do not make; "
            "choose another folder"
        )
