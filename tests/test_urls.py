"""Patterns of URLs: expanded as a shell does it, and counted before."""

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from sharding.urls import _count, expand
from tests.memory import peak_below


def test_patterns() -> None:
    """Braces are expanded as a shell does it."""
    assert expand("x.tar") == ["x.tar"]
    assert expand("s3://b/x-{08..10}.tar") == [f"s3://b/x-{i}.tar" for i in ("08", "09", "10")]
    assert expand("{a,b{1..2}}.tar") == ["a.tar", "b1.tar", "b2.tar"]
    assert _count("{0..999999}") == _count("{0..9}" * 6) == 1_000_000  # the most
    with pytest.raises(UsageError, match="a comes 2 times"):
        expand("{a,b,a}")
    for pattern in ("{a,b", "a}b", "{" * 4000):
        with pytest.raises(UsageError, match="braces that do not match"):
            expand(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999}",
        "{0..999}{0..999}{0..1}",
        "{a,{0..1000000}}",
        "{0..1000000000..7}",
        "{0..99999999999999999999}",
        "{-5..999999999}",
        "{1..2..0}{1000000..0}",
        "{a,b}" * 20,
        f"{{0..{'9' * 5000}}}",
    ],
)
def test_too_many(pattern: str) -> None:
    """What stands for more than a million is refused before it is expanded."""
    with peak_below(100_000), pytest.raises(UsageError, match="more than 1000000 tars"):
        expand(pattern)


pieces = st.recursive(
    st.sampled_from(["", "a", "b", "\\{", "{1..5..2}", "{03..1}", "{x}", "{a..c}", "{}", ","]),
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda items: "{" + ",".join(items) + "}")
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(pieces)
def test_counted_rightly(pattern: str) -> None:
    """The count is what braceexpand makes, but for ranges of letters, which are few."""
    made = len(list(braceexpand(pattern)))
    assert made == _count(pattern) * 3 ** pattern.count("{a..c}") or "{a..c}" in pattern
