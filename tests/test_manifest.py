"""Manifest: the vocabulary, its JSON, and the data set's identity."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import DataError
from sharding.manifest import Manifest, Packing, Shard, SourceCounts

ONE = Shard(url="train-000000.tar", bytes=5120, samples=3, xxh128="a" * 32, index_xxh128="b" * 32)
TWO = Manifest(
    split="train",
    classes=("n01440764", "été"),
    source=SourceCounts(found=5, packed=5, rejected=0),
    shards=(ONE, replace(ONE, url="train-000001.tar", samples=2, xxh128="c" * 32)),
)
BODY: dict[str, Any] = json.loads(TWO.to_json())


def edited(**changes: object) -> str:
    """TWO's JSON with some of its values replaced, its digest left as it was."""
    return json.dumps(BODY | changes)


def with_shard(**changes: object) -> str:
    """TWO's JSON with some values of its first shard replaced."""
    return edited(shards=[BODY["shards"][0] | changes, BODY["shards"][1]])


shards = st.builds(
    Shard,
    url=st.text(),
    bytes=st.integers(1, (1 << 60) - 1),
    samples=st.integers(1, (1 << 40) - 1),
    xxh128=st.text(),
    index_xxh128=st.text(),
)
packings = st.builds(
    Packing,
    seed=st.integers(0, (1 << 64) - 1),
    shard_bytes=st.integers(1),
    max_samples=st.none() | st.integers(1),
)


@given(st.text(), st.lists(st.text()), st.lists(shards, min_size=1), packings)
def test_round_trip(split: str, classes: list[str], parts: list[Shard], packing: Packing) -> None:
    """Every manifest comes back from its own JSON as it was."""
    packed = sum(shard.samples for shard in parts)
    manifest = Manifest(
        split=split,
        classes=tuple(classes),
        source=SourceCounts(found=packed + 1, packed=packed, rejected=1),
        shards=tuple(parts),
        packing=packing,
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_digest_is_pinned_and_ignores_urls() -> None:
    """Checkpoints carry the digest, so it stays what it is, also for a data set that was moved."""
    moved = replace(TWO, shards=tuple(replace(s, url=f"/elsewhere/{s.url}") for s in TWO.shards))
    assert TWO.digest == moved.digest == "cad0d45c996691aec1e046985ca943b9"


@pytest.mark.parametrize(
    "change",
    [
        {"shards": TWO.shards[::-1]},
        {"shards": TWO.shards[:1]},
        {"shards": (replace(ONE, xxh128="e" * 32), TWO.shards[1])},
        {"shards": (replace(ONE, index_xxh128="e" * 32), TWO.shards[1])},
        {"classes": TWO.classes[::-1]},
        {"order_version": 2},
    ],
    ids=["shards swapped", "shard less", "tar", "index", "classes swapped", "order version"],
)
def test_other_content_or_order_has_another_digest(change: dict[str, Any]) -> None:
    """Other content or order is another data set, and such an edit of the file is refused."""
    other = replace(TWO, **change)
    assert other.digest != TWO.digest
    text = json.dumps(json.loads(other.to_json()) | {"digest": TWO.digest, "order_version": 1})
    if other.order_version == 1:
        with pytest.raises(DataError, match="was changed or damaged"):
            Manifest.from_json(text)


@pytest.mark.parametrize("key", ["format_version", "order_version"])
def test_newer_version_is_refused(key: str) -> None:
    """A manifest of a newer version is refused with both versions and the remedy."""
    with pytest.raises(DataError, match=r"/d/m has .*version 7.* reads 1 and 1\. Update"):
        Manifest.from_json(edited(**{key: 7}), where="/d/m")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        TWO.to_json()[:-9],  # a copy that was cut
        b"\xff\xfe{}",  # no UTF-8
        "[" * 100_000,  # deeper than the parser's stack
        "9" * 5_000,  # longer than Python's limit on integers
        edited(format="webdataset"),
        edited(split=None),
        edited(classes=[1, 2]),
        edited(shards=[[]]),
        edited(source={"found": 5, "packed": 5, "rejected": False}),
        edited(source={"found": 6, "packed": 5, "rejected": 0}),
        edited(packing={"seed": -1}),
        edited(packing={"max_samples": 0}),
        edited(packing={"shard_bytes": 0}),
        edited(packing={"pipe": "rm -r /"}),
        with_shard(samples=0),
        with_shard(samples="3"),
        with_shard(bytes=float("inf")),
        with_shard(bytes=True),
        with_shard(url=["a"]),
    ],
    ids=itertools.count(),
)
def test_what_is_no_manifest_is_refused(text: str | bytes) -> None:
    """Text that is no manifest, by its syntax, keys, types or ranges, is refused and named."""
    with pytest.raises(DataError, match=r"^/d/m is no manifest of shardstream: "):
        Manifest.from_json(text, where="/d/m")


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.sampled_from(sorted(BODY)), anything)
def test_any_value_in_any_place_is_read_or_refused(key: str, value: object) -> None:
    """Whatever JSON stands at a key, the answer is a manifest or a DataError."""
    try:
        manifest = Manifest.from_json(edited(**{key: value}))
    except DataError:
        return
    assert manifest.digest == TWO.digest
