"""Blocks: lent to one batch at a time, free with the last reference to it, never overwritten."""

import gc
import os
import resource
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from loaders.blocks import Blocks, Lent
from loaders.loader import StreamingLoader
from loaders.pipeline import Batch
from tests.make_shards import STEPS, assert_equal, make_loader

SHAPE = (2, 5, 3)
BLOCKS = 2 + 3
"""Of a worker of make_loader's."""


def make_blocks(workers: int = 2) -> Blocks:
    """Four blocks of 30 bytes for each worker."""
    return Blocks(workers=workers, prefetch=1, size=30)


def take(blocks: Blocks, worker: int = 0) -> Lent:
    """A block that is there."""
    lent = blocks.take(worker, SHAPE)
    assert lent is not None
    return lent


def epochs(loader: StreamingLoader, number: int) -> list[Batch]:
    """All batches of this many epochs."""
    batches = []
    for epoch in range(number):
        loader.set_epoch(epoch)
        batches += list(loader)
    return batches


def send(lent: Lent) -> torch.Tensor:
    """Hand a block over as a worker's queue does."""
    tensor = ForkingPickler.loads(ForkingPickler.dumps(lent))
    assert isinstance(tensor, torch.Tensor)
    return tensor


def test_what_was_written_arrives() -> None:
    """All blocks of all workers lie apart, and arrive with what was written to them."""
    blocks = make_blocks()
    lents = [take(blocks, worker) for worker in (0, 1) for _ in range(4)]
    for value, lent in enumerate(lents):
        lent.numpy()[:] = value
    for value, tensor in enumerate(map(send, lents)):
        assert torch.equal(tensor, torch.full(SHAPE, value, dtype=torch.uint8))
    assert make_blocks().take(0, SHAPE) is not None  # other blocks are not these


def test_a_block_is_lent_until_nothing_refers_to_it() -> None:
    """None is handed out twice; a view, a slice and a NumPy array keep theirs; then it is free."""
    blocks = make_blocks()
    kept = [send(take(blocks)) for _ in range(4)]
    assert blocks.take(0, SHAPE) is None
    assert blocks.take(1, SHAPE) is not None
    place = kept[2].data_ptr()
    view = kept[2].view(-1)[3:].numpy()[1:]
    kept[2] = torch.empty(0)
    assert blocks.take(0, SHAPE) is None
    view[:] = 7
    del view
    again = take(blocks)
    assert again.numpy()[0, 1, 2] == 7
    assert send(again).data_ptr() == place


def test_a_block_that_is_never_sent_is_free_again() -> None:
    """A batch that fails leaves its block to the next one."""
    blocks = make_blocks()
    for _ in range(5):
        take(blocks)
    kept = [take(blocks) for _ in range(4)]
    assert blocks.take(0, SHAPE) is None
    send(kept.pop())
    assert blocks.take(0, SHAPE) is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_none_where_there_are_none(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without workers, and on a system without memfd, nothing is lent."""
    monkeypatch.delattr("os.memfd_create")
    assert make_blocks(workers).take(0, SHAPE) is None


def test_kept_batches_are_never_overwritten() -> None:
    """A user who keeps every batch, more of them than there are blocks, finds all as they were."""
    expected, kept = (epochs(make_loader(workers=workers), 4) for workers in (0, 1))
    assert len(kept) == 4 * STEPS > BLOCKS
    assert_equal(kept, expected)


def test_batches_that_are_dropped_come_in_the_same_memory() -> None:
    """A run touches a handful of blocks, however long it is; each batch can be written to."""
    loader = make_loader(workers=1)
    places = set()
    for epoch in range(8):
        loader.set_epoch(epoch)
        for batch in loader:
            places.add(batch.images.data_ptr())
            for tensor in batch:
                tensor.add_(1)
    assert len(places) <= BLOCKS


def test_no_memory_is_left_in_use() -> None:
    """The blocks of an ended loader are gone: no descriptor refers to them."""

    def descriptors() -> int:
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the listing's own
                links.append(os.readlink(path))
        return sum("shardstream-blocks" in link for link in links)

    batch = next(iter(make_loader(workers=1)))
    assert descriptors() > 0
    del batch
    gc.collect()
    assert descriptors() == 0


@pytest.mark.parametrize(
    ("which", "least", "text"),
    [(resource.RLIMIT_FSIZE, 1 << 20, "ulimit -f"), (resource.RLIMIT_NOFILE, 3, "ulimit -n")],
)
def test_memory_that_is_refused_is_named(which: int, least: int, text: str) -> None:
    """How much was asked for, by whom, which limit says no, and what to lower; nothing is left."""
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (least, hard))
    try:
        with pytest.raises(
            OSError, match=r"12 MB .* of 3 loader workers: .* data\.num_w"
        ) as caught:
            Blocks(workers=3, prefetch=1, size=1_000_000)
    finally:
        resource.setrlimit(which, (soft, hard))
    assert text in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before
