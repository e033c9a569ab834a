"""Members of a tar, grouped into samples.

As webdataset does it: the key is the path up to the first dot of the file's own name, the extension
is the rest in lower case, and members of one key stand side by side.

    n01440764/x1.jpg  n01440764/x1.cls  n01440764/x1.json  n01440764/x2.jpg  n01440764/x2.cls
    |---------------- n01440764/x1 ---------------------|  |--------- n01440764/x2 ---------|

A sample has one image and a label, as decimal text in `cls` or as a number in `json`. Files of
other extensions are passed over and counted, as are those webdataset skips: hidden ones, ones
without an extension, `__metadata__`. A key is unique in its shard; over shards it need not be, for
many number the samples of each shard from 0.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

import xxhash

from sharding.errors import DataError
from sharding.images import check_header
from sharding.store import Blob
from sharding.tarscan import Member, scan

IMAGES = frozenset(["jpg", "jpeg", "png", "webp"])
IMAGE_LIMIT = 1 << 30

_LABEL_BYTES = {"cls": 32, "json": 1 << 20}

_Row = tuple[int, int, int, int, int, int]
_Image = tuple[Member, tuple[int, int, int]]  # XXH3-64, width, height


def read_samples(blob: Blob, where: str, *, labels: int, label_key: str) -> "Samples":
    """All samples of the tar `where`, whose labels must be below `labels`.

    `label_key` is the label's key in a sample's JSON. The blob is read from front to back. Raises
    DataError for a tar without samples, or where anything is doubtful.
    """
    samples = Samples(blob, where, labels=labels, label_key=label_key)
    for key, members in groupby(filter(samples.has_key, scan(blob, where)), _key_of):
        samples.add_group(key, members)
    if not samples.keys:
        raise DataError(f"{where} holds no samples, only {samples.passed_over} other files")
    return samples


class Samples:
    """The samples of one tar, as they are found."""

    def __init__(self, blob: Blob, where: str, *, labels: int, label_key: str) -> None:
        self._blob = blob
        self._where = where
        self._labels = labels
        self._label_key = label_key
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
                f"{self._label_key!r}; name the right key, or remove the sample"
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
        label: object
        if extension == "cls":
            label = int(data) if data.strip().isdigit() else data
        else:
            try:
                fields = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise self._error(member, f"is no JSON: {error}") from error
            if not isinstance(fields, dict):
                raise self._error(member, "is no JSON object")
            if self._label_key not in fields:
                return None
            label = fields[self._label_key]
        if type(label) is not int or not 0 <= label < self._labels:
            raise self._error(
                member,
                f"gives the label {label!r:.60}, not one in 0..{self._labels - 1} "
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
