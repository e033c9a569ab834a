"""Adopts tars that others made: writes index and manifest for them, and leaves them where they are.

Members are grouped as webdataset does it: the key is the path up to the first dot of the file's
own name, the extension is the rest in lower case, and members of one key stand side by side.

    n01440764/x1.jpg  n01440764/x1.cls  n01440764/x1.json  n01440764/x2.jpg  n01440764/x2.cls
    |---------------- n01440764/x1 ---------------------|  |--------- n01440764/x2 ---------|

A sample has one image and a label, as decimal text in `cls` or as a number in `json`. Files of
other extensions are passed over and counted, as are those webdataset skips: hidden ones, ones
without an extension, `__metadata__`. A key is unique in its shard; over shards it need not be, for
many number the samples of each shard from 0. Each tar is read once, in pieces.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import xxhash
from braceexpand import braceexpand

from sharding.errors import DataError, UsageError
from sharding.images import check_header
from sharding.index import SampleIndex
from sharding.manifest import MANIFEST_NAME, Manifest, Shard, SourceCounts, index_name
from sharding.process import worker_pool
from sharding.store import Blob, Store, locate
from sharding.streams import Purpose, permutation, raw
from sharding.tarscan import Member, scan

IMAGES = frozenset(["jpg", "jpeg", "png", "webp"])
SHARDS_LIMIT = 1_000_000
IMAGE_LIMIT = 1 << 30
CLASSES_LIMIT = 1 << 20
"""Classes without given names: one label must not make billions of names."""

_LABEL_BYTES = {"cls": 32, "json": 1 << 20}
_PATTERN_LIMIT = 4096
_PIECE = 1 << 22
_PLACES = 5  # at which `mixing` looks
_WELL_MIXED = 0.9

Labels = npt.NDArray[np.uint32]
_Row = tuple[int, int, int, int, int, int]
_Image = tuple[Member, tuple[int, int, int]]  # XXH3-64, width, height
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


def expand(url_pattern: str) -> list[str]:
    """The URLs that a pattern with shell braces stands for: `x-{000..146}.tar`, `{a,b}.tar`.

    They are counted before any is made. Raises UsageError for more than a million, for one that
    comes twice, and for braces that do not match.
    """
    if len(url_pattern) > _PATTERN_LIMIT or _count(url_pattern) > SHARDS_LIMIT:
        raise UsageError(
            f"{url_pattern:.200} is longer than {_PATTERN_LIMIT} characters or stands for more "
            f"than {SHARDS_LIMIT} tars; give less"
        )
    try:
        urls = list(braceexpand(url_pattern))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{url_pattern:.200} has braces that do not match") from error
    _refuse_twice(urls)
    return urls


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
    _refuse_twice(places)
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
        raise DataError(f"{where} is missing or a folder; is its URL right?") from error
    reading = _Reading(task, blob, where)
    for key, members in groupby(filter(reading.has_key, scan(blob, where)), _key_of):
        reading.add_group(key, members)
    if not reading.keys:
        raise DataError(f"{where} holds no samples, only {reading.passed_over} other files")
    index = SampleIndex.from_rows(reading.rows, reading.keys).to_bytes()
    if task.write:
        with task.store.create(task.index_name) as stream:
            stream.write(index)
    return AdoptedShard(
        shard=Shard(
            url=task.url,
            bytes=blob.size,
            samples=len(reading.rows),
            xxh128=blob.hexdigest(),
            index_xxh128=xxhash.xxh3_128_hexdigest(index),
        ),
        largest_label=max(row[2] for row in reading.rows),
        kinds=reading.kinds,
        passed_over=reading.passed_over,
    )


def sorted_warning(labels_by_shard: list[Labels], *, lanes: int, window: int) -> str | None:
    """What is to be said where classes stand in runs that the loader's shuffle does not break up.

    `labels_by_shard` are the labels of each shard's samples; lanes and window are the loader's.
    """
    mixed = mixing(labels_by_shard, lanes=lanes, window=window)
    if mixed.seen >= _WELL_MIXED * mixed.full:
        return None
    return (
        f"the classes stand in sorted runs: the {mixed.samples} samples that the loader mixes at a "
        f"time ({lanes} lanes, window {window}) are of {mixed.seen:.0f} classes, where a full "
        f"shuffle has {mixed.full:.0f}. Training suffers from that; `shard.py unpack` the data set "
        "and `shard.py pack` it again, which mixes all samples"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How well the loader can shuffle a data set: classes among the samples that it mixes."""

    samples: int
    """That are mixed at a time."""
    seen: float
    """Classes among them, on average over an epoch."""
    full: float
    """Classes among as many samples of a full permutation, expected."""


def mixing(labels_by_shard: list[Labels], *, lanes: int, window: int) -> Mixing:
    """Count classes as one epoch of the loader meets them, by the rules of order.py.

    Shards in random order are laid end to end, samples inside each one permuted, the line cut into
    lanes, each lane jittered. The loader's next samples come from a window of each lane, all at the
    same place; the average is over windows at five places. Of a full permutation, m of N samples
    lack a class of n samples with a probability of (1 - m/N)^n, where n is small beside N.
    """
    parts: list[Labels] = []
    for shard in permutation(len(labels_by_shard), seed=0, purpose=Purpose.DEAL).tolist():
        labels = labels_by_shard[shard]
        order = permutation(len(labels), seed=0, purpose=Purpose.SAMPLES, item=shard)
        parts.append(labels[order])
    line = np.concatenate(parts)
    length = -(-len(line) // lanes)
    width = min(window, length)
    moved: list[Labels] = []
    for first in range(0, len(line), length):
        lane = line[first : first + length]
        jitter = raw(len(lane), seed=0, purpose=Purpose.JITTER, item=first // length) / 2**64
        moved.append(lane[np.argsort(np.arange(len(lane)) + jitter * window, kind="stable")])
    mixed = [
        np.concatenate([lane[at : at + width] for lane in moved])
        for at in np.linspace(0, length - width, _PLACES).astype(np.int64)
    ]
    counts = np.unique(line, return_counts=True)[1]
    return Mixing(
        samples=len(mixed[0]),
        seen=float(np.mean([len(np.unique(labels)) for labels in mixed])),
        full=float(np.sum(1 - (1 - len(mixed[0]) / len(line)) ** counts)),
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


class _Reading:
    """The samples of one tar, as they are found."""

    def __init__(self, task: AdoptTask, blob: Blob, where: str) -> None:
        self._task = task
        self._blob = blob
        self._where = where
        self._groups: set[str] = set()
        self.keys: list[bytes] = []
        self.rows: list[_Row] = []
        self.kinds: Counter[str] = Counter()
        self.passed_over = 0

    def has_key(self, member: Member) -> bool:
        """Whether the member belongs to a group; one that does not is counted."""
        if _key_of(member):
            return True
        self.passed_over += 1
        return False

    def add_group(self, key: str, members: Iterator[Member]) -> None:
        """Add the row of a sample; a group without image and label is counted as passed over."""
        images: list[_Image] = []
        labels: dict[str, int | None] = {}
        for member in members:
            extension = _extension(member)
            if key in self._groups:
                raise self._error(member, f"stands apart from the others of its sample {key!r}")
            if extension in labels or (extension in IMAGES and images):
                raise self._error(member, f"is a second image or label of its sample {key!r}")
            if extension in IMAGES:
                images.append((member, self._read_image(member)))
            elif extension in _LABEL_BYTES:
                labels[extension] = self._read_label(member, extension)
            else:
                self.passed_over += 1
        self._groups.add(key)
        if images or labels:
            self._add_row(key, images, {v for v in labels.values() if v is not None})

    def _add_row(self, key: str, images: list[_Image], labels: set[int]) -> None:
        sample = f"{self._where}: the sample {key!r}"
        if not images:
            raise DataError(f"{sample} has a label, but no image; remove it")
        if not labels:
            raise DataError(
                f"{sample} has no label: neither a .cls nor a .json with the key "
                f"{self._task.label_key!r}; name the right key, or remove the sample"
            )
        if len(labels) > 1:
            raise DataError(f"{sample} has the label {labels}: its .cls and .json differ")
        ((member, (xxh3, width, height)),) = images
        self.keys.append(key.encode())
        self.rows.append((member.offset, member.size, labels.pop(), xxh3, width, height))

    def _read_image(self, member: Member) -> tuple[int, int, int]:
        """XXH3-64, width and height."""
        if member.size > IMAGE_LIMIT:
            raise self._error(member, f"has {member.size} bytes; an image has up to {IMAGE_LIMIT}")
        data = self._blob.read_at(member.offset, member.size)
        facts = check_header(data, self._name(member))
        self.kinds[facts.kind] += 1
        fits = max(facts.width, facts.height) < 1 << 16
        size = (facts.width, facts.height) if fits else (0, 0)
        return xxhash.xxh3_64_intdigest(data), size[0], size[1]

    def _read_label(self, member: Member, extension: str) -> int | None:
        """The label; None for JSON that does not have the key."""
        limit = _LABEL_BYTES[extension]
        if member.size > limit:
            raise self._error(member, f"has {member.size} bytes; the limit is {limit}")
        data = self._blob.read_at(member.offset, member.size)
        label: object = None
        if extension == "cls":
            label = int(data) if data.strip().isdigit() else data
        else:
            try:
                fields = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise self._error(member, f"is no JSON: {error}") from error
            if not isinstance(fields, dict):
                raise self._error(member, "is no JSON object")
            if self._task.label_key not in fields:
                return None
            label = fields[self._task.label_key]
        if type(label) is not int or not 0 <= label < self._task.labels:
            raise self._error(
                member,
                f"gives the label {label!r:.60}, not one in 0..{self._task.labels - 1} "
                "(the classes, or the label's key in JSON, may be wrong)",
            )
        return label

    def _name(self, member: Member) -> str:
        return f"{self._where}: member {member.name!r} at offset {member.offset}"

    def _error(self, member: Member, what: str) -> DataError:
        return DataError(f"{self._name(member)} {what}; repair or remove it")


def _key_of(member: Member) -> str:
    """The key of the member's group; empty for one that webdataset skips."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, _ = name.partition(".")
    if not stem or not dot or re.match(r"__[^/]*__(/|$)", member.name):
        return ""
    return folder + slash + stem


def _extension(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


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


def _refuse_twice(urls: list[str]) -> None:
    for url, times in Counter(urls).items():
        if times > 1:
            raise UsageError(f"{url} comes {times} times; give each tar once")


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


def _count(pattern: str) -> int:
    """How many strings braceexpand would make; those that it refuses may be counted wrongly."""
    # A frame is an open brace: the strings of its alternative so far, those of the ones before,
    # and where its text began. The bottom one is the pattern itself.
    frames = [(1, 0, 0)]
    for match in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        sign = match[0]
        if sign == "{":
            frames.append((1, 0, match.end()))
        elif sign == "," and len(frames) > 1:
            product, before, begin = frames.pop()
            frames.append((1, before + product, begin))
        elif sign == "}" and len(frames) > 1:
            product, before, begin = frames.pop()
            inside = _range_length(pattern[begin : match.start()]) or before + product
            product, before, begin = frames.pop()
            frames.append((product * inside, before, begin))
    return frames[0][0]


def _range_length(text: str) -> int:
    """Numbers in `first..last[..step]`, as braceexpand counts them; 0 for other text."""
    match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", text)
    if not match:
        return 0
    first, last, step = (int(number or 0) for number in match.groups())
    return abs(last - first) // (step or 1) + 1
