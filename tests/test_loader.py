"""StreamingLoader: the same batches on every topology, and resumed at any of them."""

import json
import re
import warnings
from collections import deque
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

from loaders.augment import AugmentConfig
from loaders.pipeline import Batch
from loaders.sizes import ProgressiveConfig, Sizes
from sharding.errors import UsageError
from tests.make_shards import (
    GLOBAL_BATCH,
    ORDER,
    SAMPLES,
    STEPS,
    assert_equal,
    global_batches,
    make_loader,
    open_images,
    open_shards,
    ranks,
)


@cache
def whole_epoch(epoch: int = 0) -> list[Batch]:
    """Global batches of an epoch from a single rank without workers."""
    loader = make_loader()
    loader.set_epoch(epoch)
    return list(loader)


def test_an_epoch_is_the_orders() -> None:
    """An epoch delivers whole batches of samples that are all different, other ones each epoch."""
    epochs = [whole_epoch(epoch) for epoch in (0, 1)]
    numbers = [[n for batch in epoch for n in batch.numbers.tolist()] for epoch in epochs]
    assert all(len(set(epoch)) == STEPS * GLOBAL_BATCH for epoch in numbers)
    assert SAMPLES["train"] // GLOBAL_BATCH == STEPS
    assert numbers[0] != numbers[1]
    assert epochs[0][0].images.shape == (GLOBAL_BATCH, 16, 16, 3)


def test_a_sample_looks_different_each_time() -> None:
    """Crops are of the run's seed and the epoch: with others, a sample has other pixels."""
    other_seed = make_loader(order=replace(ORDER, seed=6))
    runs = [whole_epoch(0), whole_epoch(1), list(other_seed)]
    first, *others = [
        {int(n): image for b in run for n, image in zip(b.numbers, b.images, strict=True)}
        for run in runs
    ]
    for other in others:
        both = first.keys() & other.keys()
        assert len(both) > SAMPLES["train"] // 2
        assert not any(torch.equal(first[number], other[number]) for number in both)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("world", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (6, 1), (6, 2)]
)
def test_topology_changes_nothing(world: int, accumulate: int, workers: int) -> None:
    """Global batches are bitwise the same for any ranks, workers and accumulation, over epochs."""
    loaders = ranks(world, accumulate=accumulate, workers=workers)
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert_equal(global_batches(loaders, accumulate), whole_epoch(epoch))


@pytest.mark.parametrize(
    ("before", "after"),  # the stopped run and the resumed one
    [
        ({"world": 1}, {"world": 1, "workers": 2}),
        ({"world": 2, "workers": 2}, {"world": 3}),
        ({"world": 3, "accumulate": 2}, {"world": 2, "workers": 1}),
        ({"world": 2, "accumulate": 2, "workers": 1}, {"world": 6}),
    ],
)
@pytest.mark.parametrize("steps", range(STEPS + 1))
def test_resume(before: dict[str, Any], after: dict[str, Any], steps: int) -> None:
    """State taken at any step, through JSON, gives exactly the epoch's rest on another topology."""
    stopped = ranks(**before)
    for loader in stopped:
        loader.set_epoch(4)
        deque(islice(loader, steps * before.get("accumulate", 1)), maxlen=0)
    states = {json.dumps(loader.state_dict()) for loader in stopped}
    assert len(states) == 1, "state depends on the rank"
    state = states.pop()
    assert len(state) < 1024
    resumed = ranks(**after)
    for loader in resumed:
        loader.load_state_dict(json.loads(state))
        loader.set_epoch(4)
        assert len(loader) == STEPS
    assert_equal(global_batches(resumed), whole_epoch(4)[steps:])
    for loader in resumed:
        loader.set_epoch(5)
    assert_equal(global_batches(resumed), whole_epoch(5))


def test_state_counts_what_was_delivered() -> None:
    """Batches that workers made ahead are not in the state; those handed over are, at once."""
    loader = make_loader(workers=3)
    assert loader.state_dict()["position"] == 0
    for number, _ in enumerate(loader, 1):
        assert loader.state_dict()["position"] == number * GLOBAL_BATCH
        assert loader.state_dict()["epoch"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_begins_at_its_start(workers: int) -> None:
    """After an epoch that was cut short, and back in an earlier one, all batches are delivered."""
    loader = make_loader(workers=workers)
    next(iter(loader))
    for epoch in (1, 7, 0):
        loader.set_epoch(epoch)
        assert_equal(list(loader), whole_epoch(epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_again_goes_on(workers: int) -> None:
    """A second iter() in the same epoch, as Lightning makes it, goes on at the next batch."""
    loader = make_loader(workers=workers)
    unused, used = iter(loader), iter(loader)
    first = next(used)
    assert_equal([first, *loader], whole_epoch())
    assert list(unused) == []


def test_epoch_is_asked_for_with_the_first_batch() -> None:
    """epoch_of is called for the first batch: Lightning restores its epoch after iter()."""
    epoch = 0
    loader = make_loader(epoch_of=lambda: epoch)
    iterator = iter(loader)
    epoch = 3
    assert_equal(list(iterator), whole_epoch(3))
    assert loader.state_dict()["epoch"] == 3


@pytest.mark.parametrize(
    ("name", "there", "options"),
    [
        ("seed", 5, {"order": replace(ORDER, seed=6)}),
        ("lanes", 8, {"order": replace(ORDER, lanes=7)}),
        ("window", 4, {"order": replace(ORDER, window=3)}),
        ("global_batch", 12, {"global_batch": 14}),
        ("data set (its digest)", open_shards().digest, {"reader": open_images()}),
    ],
)
def test_another_run_is_refused(name: str, there: Any, options: dict[str, Any]) -> None:
    """State of other data, seed, lanes, window or global batch: an error that names both values."""
    state = make_loader().state_dict()
    other = make_loader(**options)
    here = other.state_dict()["digest" if "digest" in name else name]
    message = f"cannot resume: the checkpoint's {name} is {there}, this run's is {here}; "
    with pytest.raises(UsageError, match=re.escape(message)):
        other.load_state_dict(state)
    assert other.state_dict()["position"] == 0


def test_another_order_version_is_refused() -> None:
    """State of another version of the order, or of none, is refused."""
    loader = make_loader()
    for state in (loader.state_dict() | {"order_version": 0}, {}):
        with pytest.raises(UsageError, match="the checkpoint's order_version is"):
            loader.load_state_dict(state)


def test_another_decoder_is_a_warning() -> None:
    """State of another decoder is taken, with a warning that names both; its own gives none."""
    loader = make_loader()
    with pytest.warns(UserWarning, match=r"made with abacus 1\.0, this run decodes with \w"):
        loader.load_state_dict(loader.state_dict() | {"decoder": "abacus 1.0", "position": 24})
    assert_equal(list(loader), whole_epoch()[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.load_state_dict(loader.state_dict())


def test_a_position_inside_a_batch_is_refused() -> None:
    """State between two accumulated batches cannot be resumed in one piece, and says so."""
    halves = make_loader(accumulate=2)
    next(iter(halves))
    with pytest.raises(UsageError, match="position 6 is inside a batch of 12 samples"):
        make_loader().load_state_dict(halves.state_dict())
    again = make_loader(accumulate=2)
    again.load_state_dict(halves.state_dict())
    assert_equal([next(iter(again))], [Batch(*(part[6:] for part in whole_epoch()[0]))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": 5}, "12 is not divisible by 5 processes x 1 accumulated batches"),
        ({"world": 4, "accumulate": 2}, "12 is not divisible by 4 processes x 2 accumulated"),
        ({"global_batch": 0}, "global batch of 0"),
        ({"global_batch": 44}, "43 samples are fewer than one global batch of 44"),
        ({"rank": 2, "world": 2}, r"rank 2 is not in 0\.\.1"),
        ({"rank": -1}, r"rank -1 is not in 0\.\.0"),
    ],
)
def test_topology_is_checked(options: dict[str, int], message: str) -> None:
    """Parts that cannot be equal, or are not there, are refused with the numbers."""
    with pytest.raises(ValueError, match=message):
        make_loader(**options)  # type: ignore[arg-type]


RICH: dict[str, Any] = {
    "repeats": 2,
    "augment": AugmentConfig(policy="trivialaugment", erase_probability=0.5),
    "size": Sizes(
        size=16,
        progressive=ProgressiveConfig(start_size=8, start_epoch=3, end_epoch=5, multiple=4),
    ),
}


def contents(batches: list[Batch]) -> list[list[tuple[int, int, bytes]]]:
    """The samples of each batch with their pixels, whatever their order."""
    return [
        sorted(
            (int(number), int(label), image.numpy().tobytes())
            for image, label, number in zip(*batch, strict=True)
        )
        for batch in batches
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 2), (2, 1), (3, 2), (6, 1)])
def test_topology_changes_nothing_of_repeats_policies_and_sizes(
    world: int, accumulate: int, workers: int
) -> None:
    """Repeats, policies, erasing and progressive sizes: the same samples and pixels."""
    alone = make_loader(**RICH)
    loaders = ranks(world, accumulate=accumulate, workers=workers, **RICH)
    for epoch, size in ((0, 8), (4, 12), (5, 16)):
        for loader in [alone, *loaders]:
            loader.set_epoch(epoch)
        expected, found = global_batches([alone]), global_batches(loaders, accumulate)
        assert contents(found) == contents(expected)
        assert {batch.images.shape[1] for batch in found} == {size}


@pytest.mark.parametrize("steps", range(STEPS + 1))
def test_resume_with_repeats_policies_and_sizes(steps: int) -> None:
    """A state taken at any step goes on exactly, on other ranks and workers."""
    whole = make_loader(**RICH)
    whole.set_epoch(4)
    expected = contents(global_batches([whole]))
    stopped = make_loader(workers=2, **RICH)
    stopped.set_epoch(4)
    deque(islice(stopped, steps), maxlen=0)
    resumed = ranks(3, workers=1, **RICH)
    for loader in resumed:
        loader.load_state_dict(stopped.state_dict())
        loader.set_epoch(4)
    assert contents(global_batches(resumed)) == expected[steps:]
    with pytest.raises(UsageError, match="checkpoint's repeats is 2, this run's is 1"):
        make_loader().load_state_dict(stopped.state_dict())


def test_repeats_stand_apart_in_a_batch() -> None:
    """Each sample comes twice in a batch, half a batch apart, with another crop; no third time."""
    loader = make_loader(repeats=2)
    seen: list[int] = []
    for batch in loader:
        numbers = batch.numbers.tolist()
        half = len(numbers) // 2
        assert numbers[:half] == numbers[half:]
        assert len(set(numbers)) == half
        assert not any(map(torch.equal, batch.images[:half], batch.images[half:]))
        seen += numbers[:half]
    assert len(set(seen)) == len(seen) == STEPS * GLOBAL_BATCH // 2
