"""Streams: random bits as a function of who asks. The golden values were drawn with numpy 2.4.6."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.streams import Purpose, permutation, raw

keys = st.fixed_dictionaries(
    {
        "seed": st.integers(0, (1 << 64) - 1),
        "purpose": st.sampled_from(Purpose),
        "epoch": st.integers(0, (1 << 24) - 1),
        "item": st.integers(0, (1 << 32) - 1),
    }
)


def test_bits_and_purposes_are_pinned() -> None:
    """A stream never changes, at both ends of its key's range: data sets and runs hang on it."""
    names = [
        "PACK",
        "DEAL",
        "SEGMENTS",
        "SAMPLES",
        "JITTER",
        "AUGMENT",
        "VERIFY",
        "POLICY",
        "ERASE",
    ]
    assert [Purpose[name].value for name in names] == list(range(1, 10))
    first = raw(3, seed=0, purpose=Purpose.PACK)
    assert first.tolist() == [0x64F4394A789242BB, 0xFBE92B7CB59BAC9F, 0x40D714A382446853]
    top = {"seed": (1 << 64) - 1, "epoch": (1 << 24) - 1, "item": (1 << 32) - 1}
    last = raw(2, purpose=Purpose.JITTER, **top)
    assert last.tolist() == [0x29B4D0E035C367D7, 0x30F5592BD6508E49]
    inside = permutation(12, seed=7, purpose=Purpose.SAMPLES, epoch=3, item=5)
    assert inside.tolist() == [7, 2, 8, 10, 9, 4, 1, 6, 0, 3, 5, 11]


@given(st.integers(0, 300), keys)
def test_permutation_holds_each_number_once(count: int, key: dict[str, int]) -> None:
    """A permutation of n is 0..n-1, each once, as int64."""
    numbers = permutation(count, **key)  # type: ignore[arg-type]
    assert sorted(numbers.tolist()) == list(range(count))
    assert numbers.dtype == np.int64


@given(keys, keys)
def test_other_key_other_bits(one: dict[str, int], other: dict[str, int]) -> None:
    """Two streams share bits only if all four integers are the same: (0, 1) is not (1, 0)."""
    same = np.array_equal(raw(2, **one), raw(2, **other))  # type: ignore[arg-type]
    assert same == (one == other)


@pytest.mark.parametrize(
    "key", [(-1, 0, 0), (1 << 64, 0, 0), (0, -1, 0), (0, 1 << 24, 0), (0, 0, -1), (0, 0, 1 << 32)]
)
def test_range_ends(key: tuple[int, int, int]) -> None:
    """A number that has no place in the key is refused, so no stream runs into another one."""
    seed, epoch, item = key
    with pytest.raises(ValueError, match=f"seed {seed}, epoch {epoch} and item {item} must be in"):
        raw(1, seed=seed, purpose=Purpose.PACK, epoch=epoch, item=item)
