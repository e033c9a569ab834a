"""One shard of a plan: made from its images, or kept if it stands there already."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from sharding import tar
from sharding.convert import convert
from sharding.errors import BadImageError, DataError
from sharding.images import ImageFacts, check_header, check_pixels
from sharding.index import SampleIndex
from sharding.manifest import ImageRules, Shard, index_name, tar_name
from sharding.store import Store
from sharding.tarscan import scan

_NOT_LOOKED_AT = ImageFacts(format="unchecked", width=0, height=0, channels=3)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """All that is needed to make one shard, in whichever process."""

    source: Path
    store: Store
    split: str
    number: int
    paths: list[str]
    """The samples' names in the data set."""
    files: list[str]
    """Where their bytes are, relative to `source`."""
    labels: list[int]
    sizes: list[int]
    rules: ImageRules


class Reject(NamedTuple):
    """An image that was not packed, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShard:
    """A shard that stands in the store."""

    number: int
    shard: Shard
    rejects: tuple[Reject, ...]
    kinds: Mapping[str, int]


def make_shard(task: ShardTask) -> PackedShard:
    """Keep the shard if it is there and right, else write it.

    Raises BadImageError for a bad image unless the rules skip it, DataError for a file that
    changed since it was listed.
    """
    return find_shard(task)[1] or _write(task)


def find_shard(task: ShardTask) -> tuple[int, PackedShard | None]:
    """The shard's number, and the shard if tar and index are what its own images make.

    An image that is not in it has to be one that the rules skip.
    """
    try:
        blob = task.store.open(tar_name(task.split, task.number))
        stored_index = task.store.read(index_name(task.split, task.number))
    except FileNotFoundError:
        return task.number, None
    try:
        members = {m.name.rpartition(".")[0]: m for m in scan(blob, "") if m.name[-4:] != ".cls"}
        rejects: list[Reject] = []

        def stored() -> Iterator[_Sample]:
            for i, path in enumerate(task.paths):
                member = members.get(tar.member_name(path)[0])
                if member is None:
                    rejects.append(_reject(task, i))
                elif task.rules.converts or member.size == task.sizes[i]:
                    data = blob.read_at(member.offset, member.size)
                    yield _Sample(path, task.labels[i], data, _look(data, path, task.rules))
                else:
                    raise DataError(f"{path} has another size")

        assembly = _Assembly(stored(), converted=task.rules.converts)
        position = 0
        for chunk in assembly:
            if blob.read_at(position, len(chunk)) != chunk:
                return task.number, None
            position += len(chunk)
    except DataError:  # shorter than it should be, or no image where one should be
        return task.number, None
    if position != blob.size or assembly.index() != stored_index:
        return task.number, None
    return task.number, assembly.result(task, rejects, stored_index)


def _write(task: ShardTask) -> PackedShard:
    rejects: list[Reject] = []

    def samples() -> Iterator[_Sample]:
        for i in range(len(task.paths)):
            try:
                yield _load(task, i)
            except BadImageError as error:
                if task.rules.on_bad == "fail":
                    raise BadImageError(
                        f"{error}; repair or remove it, or pass --on_bad skip"
                    ) from error
                rejects.append(_rejected(task, i, error))

    assembly = _Assembly(samples(), converted=task.rules.converts)
    with task.store.create(tar_name(task.split, task.number)) as stream:
        for chunk in assembly:
            stream.write(chunk)
        if len(rejects) == len(task.paths):
            raise DataError(
                f"all {len(rejects)} images of shard {task.number} are bad, the first is "
                f"{rejects[0].path}: {rejects[0].reason}"
            )
    index = assembly.index()
    with task.store.create(index_name(task.split, task.number)) as stream:
        stream.write(index)
    return assembly.result(task, rejects, index)


class _Sample(NamedTuple):
    path: str
    label: int
    image: bytes
    facts: ImageFacts


class _Assembly:
    """The bytes of a shard, one sample after the other; index and result when they were taken."""

    def __init__(self, samples: Iterable[_Sample], *, converted: bool) -> None:
        self._samples = samples
        self._converted = converted
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._keys: list[bytes] = []
        self._kinds: Counter[str] = Counter()
        self._digest = xxhash.xxh3_128()
        self._size = 0

    def __iter__(self) -> Iterator[bytes]:
        for sample in self._samples:
            key, extension = tar.member_name(sample.path)
            if self._converted and sample.facts.format == "JPEG":
                extension = extension if extension.lower() in {"jpg", "jpeg"} else "jpg"
            image = tar.member(f"{key}.{extension}", sample.image)
            label = tar.member(f"{key}.cls", b"%d" % sample.label)
            self._note(sample, key, self._size + len(image[0]))
            for piece in (*image, b"".join(label)):  # joined, an image would be copied
                yield self._count(piece)
        yield self._count(tar.END)

    def index(self) -> bytes:
        """The index file."""
        return SampleIndex.from_rows(self._rows, self._keys).to_bytes()

    def result(self, task: ShardTask, rejects: list[Reject], index: bytes) -> PackedShard:
        """What there is to know of the shard."""
        shard = Shard(
            url=tar_name(task.split, task.number),
            bytes=self._size,
            samples=len(self._rows),
            xxh128=self._digest.hexdigest(),
            index_xxh128=xxhash.xxh3_128_hexdigest(index),
        )
        return PackedShard(
            number=task.number, shard=shard, rejects=tuple(rejects), kinds=self._kinds
        )

    def _note(self, sample: _Sample, key: str, at: int) -> None:
        facts, image = sample.facts, sample.image
        fits = max(facts.width, facts.height) < 1 << 16
        size = (facts.width, facts.height) if fits else (0, 0)
        row = (at, len(image), sample.label, xxhash.xxh3_64_intdigest(image), *size)
        self._rows.append(row)
        self._keys.append(key.encode())
        self._kinds[facts.kind] += 1

    def _count(self, chunk: bytes) -> bytes:
        self._digest.update(chunk)
        self._size += len(chunk)
        return chunk


def _load(task: ShardTask, i: int) -> _Sample:
    """The task's i-th sample, checked and made what the rules want. Raises BadImageError."""
    path, size, rules = task.paths[i], task.sizes[i], task.rules
    where = str(task.source / task.files[i])
    if size == 0:
        raise BadImageError(f"{where} is empty")
    if size >= 1 << 32:
        raise DataError(f"{where} has {size} bytes; an image's limit is 4 GiB")
    try:
        data = (task.source / task.files[i]).read_bytes()
    except FileNotFoundError:
        data = b""
    if len(data) != size:
        raise DataError(
            f"{where} changed while packing ({size} bytes listed, {len(data)} read); start again"
        )
    facts = _look(data, where, rules)
    if rules.check == "decode":
        check_pixels(data, where)
    stored = convert(data, facts, rules, where)
    if stored is not data:
        facts = _look(stored, where, rules)
    return _Sample(path, task.labels[i], stored, facts)


def _look(data: bytes, where: str, rules: ImageRules) -> ImageFacts:
    if rules.check == "none":
        return _NOT_LOOKED_AT
    return check_header(data, where, max_pixels=rules.max_pixels)


def _reject(task: ShardTask, i: int) -> Reject:
    """The reject that a missing sample has to be. Raises DataError if it is none."""
    try:
        _load(task, i)
    except BadImageError as error:
        if task.rules.on_bad == "skip":
            return _rejected(task, i, error)
        raise
    raise DataError(f"{task.paths[i]} is missing")


def _rejected(task: ShardTask, i: int, error: BadImageError) -> Reject:
    """Without the source's place, so that the same images give the same list anywhere."""
    where = str(task.source / task.files[i])
    return Reject(task.paths[i], str(error).removeprefix(where).strip())
