"""The places of a step: those of the order, and of the bytes that stand there."""

from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.locate import Place, places
from loaders.order import Order, OrderConfig
from sharding.dataset import PackedSplit
from sharding.errors import UsageError


@pytest.fixture(scope="module")
def packed(small_shards: Path) -> PackedSplit:
    """51 samples in shards of up to 9."""
    return PackedSplit.open(str(small_shards / "train"))


def find(split: PackedSplit, **asked: Any) -> list[Place]:
    """Of an order with few lanes."""
    order = Order(
        [shard.samples for shard in split.manifest.shards], OrderConfig(lanes=4, window=3)
    )
    return places(split, order, **({"epoch": 2, "step": 1, "world": 1} | asked))


@settings(max_examples=30, deadline=None)
@given(parts=st.integers(1, 4), world=st.sampled_from([1, 2, 3, 4, 6]), step=st.integers(0, 1))
def test_ranks_together_have_the_batch(
    packed: PackedSplit, parts: int, world: int, step: int
) -> None:
    """The same places, in the same order, for any number of ranks; each has its part."""
    batch = parts * world
    alone = find(packed, global_batch=batch, step=step)
    shared = find(packed, global_batch=batch, step=step, world=world)
    assert [place[1:] for place in shared] == [place[1:] for place in alone]
    assert [place.rank for place in shared] == [r for r in range(world) for _ in range(parts)]
    few = find(packed, global_batch=batch, step=step, world=world, most=1)
    assert few == shared[::parts]


def test_the_bytes_stand_there(packed: PackedSplit) -> None:
    """An epoch's steps name each sample once, with the bytes that its index has hashed."""
    found = [place for step in range(17) for place in find(packed, global_batch=3, step=step)]
    assert len({place.key for place in found}) == 51
    hashes = {
        index.key(row): int(index.table["xxh3"][row])
        for index in map(packed.read_index, range(len(packed.manifest.shards)))
        for row in range(len(index))
    }
    for place in found:
        tar = Path(packed.store.url, place.shard).read_bytes()
        data = tar[place.offset : place.offset + place.size]
        assert xxhash.xxh3_64_intdigest(data) == hashes[place.key]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"global_batch": 10, "step": 5}, "no step 5: an epoch has 5 steps, 0 to 4"),
        ({"global_batch": 10, "world": 4}, "a global batch of 10 is not divisible by 4 ranks"),
        ({"global_batch": 52}, "the data set's 51 samples are fewer than one global batch of 52"),
    ],
)
def test_what_there_is_not(packed: PackedSplit, asked: dict[str, int], message: str) -> None:
    """A step behind the epoch's end, and a batch that cannot be shared."""
    with pytest.raises(UsageError, match=message):
        find(packed, **asked)
