"""Workers: started once, deaf to signals, silent, and gone with whoever started them."""

import gc
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders.reader import ShardReader
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from tests.make_shards import (
    GLOBAL_BATCH,
    STEPS,
    assert_equal,
    copy_of_shards,
    data_set,
    global_batches,
    make_loader,
    open_shards,
)

HEADER = """
import multiprocessing, os, signal, sys
from pathlib import Path
from tests.make_shards import make_loader, open_shards
loader = make_loader(open_shards(Path(sys.argv[1])), workers=2)
stream = iter(loader)
next(stream), next(stream)
pids = [worker.pid for worker in multiprocessing.active_children()]
print(*pids, flush=True)
"""


def children() -> set[int]:
    """Process ids of this process's workers."""
    return {process.pid for process in multiprocessing.active_children() if process.pid}


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    """Every test's loaders take their workers with them."""
    gc.collect()
    before = children()
    yield
    gc.collect()
    assert children() <= before


def start(program: str) -> subprocess.Popen[str]:
    """Start a program that has a loader with two workers, in a process group of its own."""
    # Seen twice in a hundred ends under load: the tracker misses a semaphore that is removed.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    return subprocess.Popen(
        [sys.executable, "-W", quiet, "-c", HEADER + program, str(data_set() / "shards")],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_workers_run_on_from_epoch_to_epoch() -> None:
    """The processes of the first batch make all epochs, whether these are ended early or not."""
    before = children()
    loader = make_loader(workers=2)
    iterator = iter(loader)
    next(iterator)
    workers = children() - before
    assert len(workers) == 2
    for epoch in (1, 2, 3):
        loader.set_epoch(epoch)
        for number, _ in enumerate(loader):
            if epoch == 2 and number == 1:
                break
        assert children() - before == workers


class Noting(ShardReader):
    """Notes each read in a file beside the shards, from whichever process it comes."""

    def read(self, number: int) -> bytes:
        """See Reader."""
        with open(f"{self.split.store.url}/reads", "ab") as notes:
            notes.write(b".")
        return super().read(number)


def test_nothing_made_ahead_is_lost_between_epochs(tmp_path: Path) -> None:
    """Workers run on into the next epoch: they read what is delivered and what they are ahead."""
    folder = copy_of_shards(tmp_path) / "train"
    loader = make_loader(Noting(PackedSplit.open(str(folder))), workers=1)
    for epoch in range(6):
        loader.set_epoch(epoch)
        assert len(list(loader)) == STEPS
    reads = (folder / "reads").stat().st_size
    assert 0 <= reads - 6 * STEPS * GLOBAL_BATCH <= 3 * GLOBAL_BATCH


def test_workers_end_with_their_loader() -> None:
    """Deleting a loader in the middle of an epoch ends its workers at once."""
    before = children()
    loader = make_loader(workers=3)
    iterator = iter(loader)
    next(iterator)
    assert len(children() - before) == 3
    del iterator, loader
    assert children() == before


def test_workers_are_deaf_to_signals() -> None:
    """SIGINT, SIGTERM and SIGUSR1, which go to whole process groups, do not disturb workers."""
    before = children()
    expected = global_batches([make_loader()])
    loader = make_loader(workers=2)
    iterator = iter(loader)
    found = [next(iterator), next(iterator)]
    workers = children() - before
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in workers:
            os.kill(pid, name)
    assert_equal([*found, *iterator], expected)
    assert children() - before == workers


def test_workers_die_with_a_killed_parent() -> None:
    """SIGKILL to the training process leaves no worker behind."""
    with start("signal.pause()") as process:
        assert process.stdout is not None
        watched = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        process.kill()
        for descriptor in watched:
            assert select.select([descriptor], [], [], 20)[0], "a worker outlived its parent"
            os.close(descriptor)
    assert len(watched) == 2


@pytest.mark.parametrize(
    ("program", "status", "last"),
    [
        ("", 0, ""),  # loader and iterator are still referred to
        ("try: loader.load_state_dict({})\nexcept ValueError as error: kept = error", 0, ""),
        ("for batch in stream: raise ValueError('stop')", 1, "ValueError: stop"),
        ("for batch in stream: sys.exit(3)", 3, ""),
        ("os.killpg(0, signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),  # Ctrl-C
    ],
)
def test_a_program_ends_promptly(program: str, status: int, last: str) -> None:
    """A program with a loader ends with its own status and message, none of the workers'."""
    with start(program) as process:
        pids, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert len(pids.split()) == 2
    assert errors.count("Traceback") == bool(last)
    assert errors.rstrip().endswith(last)
    assert errors == "" or last


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_once_and_plainly(tmp_path: Path, workers: int) -> None:
    """Damage is one DataError of one line at its own step, every time that step is asked for."""
    root = copy_of_shards(tmp_path)
    split = PackedSplit.open(str(root / "train"))
    expected = global_batches([make_loader()])
    number = int(expected[1].numbers[5])
    shard, row = divmod(number, 7)
    offset = int(split.read_index(shard).table["offset"][row])
    with open(root / f"train/train-{shard:06d}.tar", "r+b") as tar:
        os.pwrite(tar.fileno(), b"\0\0\0\0", offset + 20)
    loader = make_loader(open_shards(root), workers=workers)
    assert_equal([next(iter(loader))], expected[:1])
    for _ in range(2):
        with pytest.raises(DataError, match=rf"train-{shard:06d}\.tar, offset {offset}") as caught:
            next(iter(loader))
        assert "\n" not in str(caught.value)
        assert loader.state_dict()["position"] == 12
    loader.load_state_dict(loader.state_dict() | {"position": 24})
    assert_equal(list(loader), expected[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_untouched(workers: int) -> None:
    """Iterating draws nothing from the generators of torch, numpy and Python."""

    def states() -> list[bytes]:
        return [
            torch.get_rng_state().numpy().tobytes(),
            repr(np.random.get_state()).encode(),  # noqa: NPY002
            repr(random.getstate()).encode(),
        ]

    before = states()
    assert len(list(make_loader(workers=workers))) == STEPS
    assert states() == before
