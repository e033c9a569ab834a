"""Sizes: FFCV's progressive resizing, and no resizing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.sizes import ProgressiveConfig, Sizes


def test_none() -> None:
    """Without a start size every epoch has the training size."""
    assert [Sizes(size=224).at(epoch) for epoch in (0, 5, 90)] == [224] * 3
    assert Sizes(size=224).largest == 224


def test_ffcvs_16_epochs() -> None:
    """160 up to epoch 11, 192 from epoch 13 on, the nearest multiple of 32 in between."""
    sizes = Sizes(
        size=192, progressive=ProgressiveConfig(start_size=160, start_epoch=11, end_epoch=13)
    )
    assert [sizes.at(epoch) for epoch in range(16)] == [160] * 12 + [192] * 4
    assert sizes.largest == 192


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 20), st.integers(0, 20))
def test_it_goes_from_one_to_the_other(start: int, size: int, first: int, length: int) -> None:
    """Monotonous in between, exact at both ends, never larger than the largest."""
    config = ProgressiveConfig(
        start_size=start, start_epoch=first, end_epoch=first + length, multiple=8
    )
    sizes = Sizes(size=size, progressive=config)
    found = [sizes.at(epoch) for epoch in range(first + length + 2)]
    if length:
        assert set(found[: first + 1]) == {start}
    assert found[-1] == size
    assert max(found) <= sizes.largest
    between = found[first + 1 : first + length]
    assert between == sorted(between, reverse=start > size)


@pytest.mark.parametrize(
    "options", [{"start_size": 0}, {"start_epoch": 3, "end_epoch": 2}, {"multiple": 0}]
)
def test_values_out_of_range(options: dict[str, int]) -> None:
    """Refused with the values."""
    with pytest.raises(ValueError, match="must be"):
        ProgressiveConfig(**options)
