"""Topology: how batches are cut, and which runs may go on."""

from typing import Any

import pytest

from loaders.order import OrderConfig
from loaders.topology import Topology, check_identity, run_identity
from sharding.errors import UsageError
from tests.make_shards import open_shards


def test_parts() -> None:
    """A rank's batch, and the different samples of a global one."""
    topology = Topology(global_batch=48, world=2, accumulate=3, repeats=4)
    assert (topology.batch, topology.different) == (8, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 0}, "0 is not divisible by 1 processes x 1 accumulated"),
        ({"global_batch": 12, "world": 5}, "12 is not divisible by 5 processes"),
        ({"global_batch": 12, "world": 2, "accumulate": 4}, "2 processes x 4 accumulated"),
        ({"global_batch": 12, "world": 2, "repeats": 4}, "2 processes x 4 repeats"),
        ({"global_batch": 12, "repeats": 0}, "x 0 repeats"),
    ],
)
def test_what_cannot_be_cut(options: dict[str, int], message: str) -> None:
    """Named with both numbers."""
    with pytest.raises(UsageError, match=message):
        Topology(**options)


def test_identity() -> None:
    """Each value counts; a state from before there were repeats means one."""
    mine = run_identity(open_shards(), OrderConfig(), 12, 1)
    check_identity(mine, mine)
    old: dict[str, Any] = {name: value for name, value in mine.items() if name != "repeats"}
    check_identity(old, mine)
    for name, value in mine.items():
        what = r"data set \(its digest\)" if name == "digest" else name
        with pytest.raises(
            UsageError, match=f"checkpoint's {what} is other, this run's is {value}"
        ):
            check_identity(mine | {name: "other"}, mine)
    with pytest.raises(UsageError, match="checkpoint's repeats is 1, this run's is 3"):
        check_identity(old, mine | {"repeats": 3})
