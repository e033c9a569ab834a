"""What `shard.py info` says of a split: facts, and histograms that leave nothing out."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding import info
from sharding.copy import copy
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.info import Bin, Tally, charts, facts, histogram, histograms, tally
from sharding.manifest import ImageRules
from sharding.store import open_store
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_images import image, image_folder, pack_folder, write_files


@pytest.fixture
def packed(tmp_path: Path) -> PackedSplit:
    """Five shards of up to 4 samples: 12 images of 12 x 9 pixels of a, 6 of b, one of 90 x 70."""
    source = image_folder(tmp_path / "in", {"a": 12, "b": 6})
    write_files(source, {"b/large.JPEG": image(50, size=(90, 70))})
    return pack_folder(source, tmp_path / "packed", max_samples=4)


@given(st.dictionaries(st.integers(0, 1 << 17), st.integers(1, 1000), min_size=1))
def test_a_histogram_counts_everything_once(values: dict[int, int]) -> None:
    """Few bins side by side, from the least value to the greatest; 0 is not a value."""
    counts = np.zeros(max(values) + 1, np.int64)
    for value, count in values.items():
        counts[value] = count
    bins = histogram(counts)
    known = {value: count for value, count in values.items() if value}
    assert len(bins) <= 9
    assert bool(bins) == bool(known)
    for one, following in pairwise(bins):
        assert following.first == one.last + 1
    for one in bins:
        inside = {v: n for v, n in known.items() if one.first <= v <= one.last}
        assert one.things == sum(inside.values())
    assert sum(one.things for one in bins) == sum(known.values())
    if bins:
        assert bins[0].things
        assert bins[-1].things


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([40] * 7, [(40, 40, 7)]),
        ([1, 2, 2, 8], [(n, n, {1: 1, 2: 2, 8: 1}.get(n, 0)) for n in range(1, 9)]),
        ([732, 1300], [(700, 799, 1), *((n, n + 99, 0) for n in range(800, 1300, 100)),
            (1300, 1399, 1)]),
        ([100, 375, 500, 5000], [(64, 127, 1), (128, 255, 0), (256, 511, 2), (512, 1023, 0),
            (1024, 2047, 0), (2048, 4095, 0), (4096, 8191, 1)]),
        ([1, 65_535], [(1, 3, 1), *((4**n, 4 ** (n + 1) - 1, 0) for n in range(1, 7)),
            (16_384, 65_535, 1)]),
        ([15, 120], [(1, 19, 1), *((n, n + 19, 0) for n in range(20, 120, 20)), (120, 139, 1)]),
    ],
)  # fmt: skip
def test_bins_are_round_numbers(values: list[int], expected: list[tuple[int, int, int]]) -> None:
    """Steps of 1, 2 or 5 times a power of ten; powers of two where the range is wide."""
    assert histogram(np.bincount(values)) == [Bin(*one) for one in expected]


def test_all_indexes_are_counted(packed: PackedSplit) -> None:
    """Labels, shorter sides and file sizes of every sample."""
    found = tally(packed)
    assert found.shards == 5
    assert found.labels.tolist() == [12, 7]
    assert {side: n for side, n in enumerate(found.sides.tolist()) if n} == {9: 18, 70: 1}
    sizes = [int(n) for i in range(5) for n in packed.read_index(i).table["size"]]
    assert found.kilobytes.tolist() == np.bincount([-(-size // 1000) for size in sizes]).tolist()


def test_of_many_shards_some_are_read(
    packed: PackedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spread over all; their classes are not taken for the whole's. Asked for, all are read."""
    monkeypatch.setattr(info, "MOST_SHARDS", 2)
    for number in (1, 3, 4):
        (tmp_path / "packed" / packed.manifest.index_name(number)).unlink()
    found = tally(packed)
    assert found.shards == 2
    assert found.labels.sum() == sum(packed.manifest.shards[n].samples for n in (0, 2))
    lines = charts(found, packed)
    of = ", 2 of 5 shards (--all: every one)"
    assert [line for line in lines if line.startswith("train: ")] == [
        f"train: images by shorter side in pixels{of}",
        f"train: images by size of the file in kB{of}",
    ]
    assert histograms(found, packed)["class_samples"] is None
    with pytest.raises(DataError, match="is missing"):
        tally(packed, every=True)


def test_what_people_read(packed: PackedSplit) -> None:
    """A bar for each bin, as long as its share of the longest; what is unknown; the extremes."""
    sides = np.zeros(41, np.int64)
    sides[[0, 9, 40]] = 5, 20, 1
    few = np.array([0, 19])
    lines = charts(Tally(5, few, sides, few), packed)
    assert lines == [
        "",
        "train: images by shorter side in pixels",
        f"  {'5 to 9':>8}  {'#' * 40}  20",
        *(f"  {f'{n} to {n + 4}':>8}  {'':40}  0" for n in range(10, 40, 5)),
        f"  {'40 to 44':>8}  {'##':40}  1",
        f"  {'unknown':>8}  {'#' * 10:40}  5",
        "",
        "train: images by size of the file in kB",
        f"  1  {'#' * 40}  19",
        "",
        "train: classes by number of images",
        f"    19  {'#' * 40}  1",
        f"  none  {'#' * 40}  1",
        "  fewest 0: a; most 19: b",
    ]


def test_what_programs_read(packed: PackedSplit) -> None:
    """The same, and how many samples each class has."""
    assert histograms(tally(packed), packed) == {
        "shards_read": 5,
        "shorter_side": [(1, 9, 18), *((n, n + 9, 0) for n in range(10, 70, 10)), (70, 79, 1)],
        "sides_unknown": 0,
        "kilobytes": histogram(tally(packed).kilobytes),
        "class_samples": [12, 7],
    }


def test_from_s3(packed: PackedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes come from there by several threads; the same is said."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    there = open_store(f"s3://{BUCKET}/{tmp_path.name}/info")
    copy(packed, there, workers=1)
    remote = PackedSplit.open(there.url)
    assert charts(tally(remote), remote) == charts(tally(packed), packed)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (ImageRules(), "nothing"),
        (ImageRules(resize=64), "shorter side at most 64, quality 90"),
        (
            ImageRules(resize=64, transcode=True, quality=80),
            "shorter side at most 64 and transcoded to JPEG, quality 80",
        ),
    ],
)
def test_facts(packed: PackedSplit, rules: ImageRules, said: str) -> None:
    """From the manifest alone."""
    manifest = dataclasses.replace(packed.manifest, images=rules)
    found = facts(dataclasses.replace(packed, manifest=manifest))
    assert found["made_anew"] == said
    assert found["samples"] == 19
    assert found["samples_a_shard"] == "3 to 4"
    assert found["kinds"] == "19 JPEG"
