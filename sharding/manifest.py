"""What a packed data set is: the vocabulary that every other part shares.

A manifest is written last. A folder without one is an unfinished data set.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from sharding.errors import DataError

FORMAT_VERSION = 1
ORDER_VERSION = 1
MANIFEST_NAME = "manifest.json"

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""What is ever decoded. Pillow knows many more formats, and each is a way in for hostile bytes."""
MAX_PIXELS = 89_478_485
"""From this size Pillow warns of a decompression bomb, and the decoder refuses an image."""
CHECKS = ("header", "decode", "none")
ON_BAD = ("fail", "skip")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar of samples and the index beside it."""

    url: str
    """File name beside the manifest, or an absolute URL for shards that were adopted."""
    bytes: int
    samples: int
    xxh128: str
    """XXH3-128 of the tar, in hex."""
    index_xxh128: str
    """XXH3-128 of the sample index, in hex."""

    def __post_init__(self) -> None:
        if not (1 <= self.samples < 1 << 40 and 1 <= self.bytes < 1 << 60):
            raise ValueError(
                f"shard {self.url} has {self.samples} samples in {self.bytes} bytes; "
                "both must be at least 1, and below 2^40 and 2^60"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """Where every file of the source went: found = packed + rejected."""

    found: int
    packed: int
    rejected: int
    kinds: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Packed images by what their bytes say they are: JPEG, JPEG grey, JPEG CMYK, PNG, WEBP."""

    def __post_init__(self) -> None:
        if self.found != self.packed + self.rejected:
            raise ValueError(
                f"{self.found} images found, but {self.packed} packed and {self.rejected} rejected"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """The options that decide which sample stands where."""

    seed: int = 0
    shard_bytes: int = 128_000_000
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in 0..2^64-1, got {self.seed}")
        if self.shard_bytes < 1:
            raise ValueError(f"shard size must be at least 1 byte, got {self.shard_bytes}")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {self.max_samples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRules:
    """Which images are packed, and what is done to them; by default nothing."""

    check: str = "header"
    """header: must be one of the formats; decode: must also decode whole; none: not looked at."""
    on_bad: str = "fail"
    """What happens to one that must not be packed: fail, or skip it and list it."""
    max_pixels: int = MAX_PIXELS
    """Width x height; a larger image is bad."""
    resize: int | None = None
    """Pixels to which a longer shorter side is reduced."""
    quality: int = 90
    """Of the JPEGs that are made by resizing and transcoding."""
    transcode: bool = False
    """Store what is no grey or colour JPEG (CMYK, PNG, WebP) as one."""

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {self.check!r}")
        if self.on_bad not in ON_BAD:
            raise ValueError(f"on_bad must be one of {', '.join(ON_BAD)}, got {self.on_bad!r}")
        if self.max_pixels < 1 or (self.resize is not None and self.resize < 1):
            raise ValueError(
                f"max_pixels and resize must be at least 1, got {self.max_pixels} and {self.resize}"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {self.quality}")
        if self.check == "none" and self.converts:
            raise ValueError("check cannot be none where images are resized or transcoded")

    @property
    def converts(self) -> bool:
        """Whether an image may be stored with other bytes than its file's."""
        return self.resize is not None or self.transcode


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One split of a data set: its classes in label order, its shards in sample order."""

    split: str
    classes: tuple[str, ...]
    source: SourceCounts
    shards: tuple[Shard, ...]
    packing: Packing | None = field(default_factory=Packing)
    """None for shards that others made."""
    images: ImageRules = field(default_factory=ImageRules)
    order_version: int = ORDER_VERSION

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("a data set has at least one shard")

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Identity of the data set: content and order only, so a copy elsewhere has the same."""
        identity = [
            self.order_version,
            self.classes,
            [(s.samples, s.xxh128, s.index_xxh128) for s in self.shards],
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(identity, separators=(",", ":")).encode())

    def index_name(self, shard: int) -> str:
        """File name of the shard's sample index, beside the manifest."""
        return index_name(self.split, shard)

    def to_json(self) -> str:
        """Text of manifest.json; the same manifest gives the same text."""
        body = {"format": "shardstream", "format_version": FORMAT_VERSION, "digest": self.digest}
        return json.dumps(body | asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = MANIFEST_NAME) -> "Manifest":
        """Read a manifest; `where` names it in errors.

        Raises DataError when the text is no manifest, is of a newer version, or was changed.
        """
        try:
            body = json.loads(text)
            if body["format"] != "shardstream":
                raise ValueError(f"format is {body['format']!r}, not 'shardstream'")
            version = body["format_version"]
            if version != FORMAT_VERSION or body["order_version"] != ORDER_VERSION:
                raise DataError(
                    f"{where} has format version {version} and order version "
                    f"{body['order_version']}; this program reads {FORMAT_VERSION} and "
                    f"{ORDER_VERSION}. Update shardstream, or pack the data set again."
                )
            manifest = cls(
                split=_text(body["split"]),
                classes=tuple(_text(name) for name in body["classes"]),
                source=_source(body["source"]),
                shards=tuple(Shard(**_typed(Shard, shard)) for shard in body["shards"]),
                packing=body["packing"] and Packing(**_typed(Packing, body["packing"])),
                images=ImageRules(**_typed(ImageRules, body.get("images", {}))),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{where} is no manifest of shardstream: {error!r}") from error
        if body.get("digest") != manifest.digest or manifest.samples != manifest.source.packed:
            raise DataError(
                f"{where} was changed or damaged: its digest says {body.get('digest')}, its "
                f"content {manifest.digest}. Restore it, or pack the data set again."
            )
        return manifest


def tar_name(split: str, shard: int) -> str:
    """File name of a shard that we pack."""
    return f"{split}-{shard:06d}.tar"


def index_name(split: str, shard: int) -> str:
    """File name of a shard's sample index."""
    return f"{split}-{shard:06d}.npy"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    value.encode()  # refuses lone surrogates
    return value


def _integers(values: Mapping[str, Any]) -> dict[str, int]:
    for key, value in values.items():
        if type(value) is not int:
            raise TypeError(f"expected an integer for {key}, got {value!r}")
    return dict(values)


def _source(values: Mapping[str, Any]) -> SourceCounts:
    counts = dict(values)
    kinds = _integers(counts.pop("kinds", {}))
    return SourceCounts(**_integers(counts), kinds=kinds)


def _typed(kind: type[Shard | Packing | ImageRules], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check each value against the field's annotation: JSON brings strings, integers and null."""
    annotations = kind.__annotations__
    for key, value in values.items():
        expected = annotations[key]
        if not isinstance(value, expected) or isinstance(value, bool) is not (expected is bool):
            raise TypeError(f"expected {expected} for {key}, got {value!r}")
    return dict(values)
