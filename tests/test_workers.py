"""Workers: started once, deaf to signals, silent, and gone with whoever started them."""

import errno
import gc
import multiprocessing
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders.loader import StreamingLoader
from loaders.reader import ShardReader
from loaders.workers import _ending
from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
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


DEAF = """
from multiprocessing.forkserver import _forkserver
from multiprocessing.resource_tracker import _resource_tracker
for pid in (_forkserver._forkserver_pid, _resource_tracker._pid):
    lines = dict(line.split(":") for line in open(f"/proc/{pid}/status"))
    deaf = int(lines["SigBlk"], 16) | int(lines["SigIgn"], 16)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        assert deaf >> name - 1 & 1, (pid, name)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""


def test_pythons_helpers_are_deaf_to_signals() -> None:
    """The fork server and the resource tracker: SLURM signals every process of a task."""
    with start(DEAF) as process:
        _, errors = process.communicate(timeout=30)
    assert errors == ""
    assert process.returncode == 0


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


def begin(loader: StreamingLoader, workers: int) -> None:
    """Wait for a batch of each worker: then all have imported what they need."""
    batches = iter(loader)
    for _ in range(workers):
        next(batches)


def processes_of(loader: StreamingLoader) -> list[BaseProcess]:
    """The workers of a loader that has begun, by number."""
    found: list[BaseProcess] = loader._workers._loader.pipeline[0]._iterator._workers
    return found


def run_on(loader: StreamingLoader) -> None:
    """Train for many epochs."""
    for epoch in range(100):
        loader.set_epoch(epoch)
        for _ in loader:
            pass


def test_a_killed_worker_is_named() -> None:
    """The message has its number, its process, the likely cause and what to do."""
    loader = make_loader(workers=2)
    next(iter(loader))
    victim = processes_of(loader)[1].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(ChildProcessError) as caught:
        run_on(loader)
    text = str(caught.value)
    assert text.startswith(f"loader worker 1 (process {victim}) was killed")
    assert "lower data.num_workers" in text
    assert "worker 0" not in text


@pytest.mark.parametrize(
    ("status", "kills", "text"),
    [
        (-signal.SIGKILL, 0, r"killed \(SIGKILL\): by the kernel for memory .* or by somebody"),
        (-signal.SIGKILL, 2, r"for memory, most likely: .* to 2 of the machine's processes; lower"),
        (-signal.SIGBUS, 0, r"no memory for its batch \(SIGBUS\); lower data.num_workers"),
        (-signal.SIGSEGV, 0, r"crashed \(SIGSEGV\); data.decoder=pillow"),
        (1, 0, r"ended with status 1; what it said"),
    ],
)
def test_each_end_has_its_remedy(status: int, kills: int, text: str) -> None:
    """Killed for memory or by somebody, no memory for a batch, a crash, an error at the start."""
    assert re.search(text, _ending(status, kills))


class Greedy(ShardReader):
    """Wants gigabytes for each sample."""

    def read(self, number: int) -> bytes:
        """See Reader."""
        np.empty(1 << 30)
        return super().read(number)


class Wrong(ShardReader):
    """Has a bug."""

    def read(self, number: int) -> bytes:
        """See Reader."""
        raise RuntimeError(f"a bug in sample {number}")


def limit(loader: StreamingLoader, which: int, value: Callable[[int], int]) -> None:
    """Set a limit of each worker's, as `ulimit` would have. value: of a process id."""
    for process in processes_of(loader):
        assert process.pid is not None
        hard = resource.prlimit(process.pid, which)[1]
        resource.prlimit(process.pid, which, (value(process.pid), hard))


def half_a_gigabyte_more(pid: int) -> int:
    """Than the process has of address space."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize() + (1 << 29)


def test_a_worker_without_memory_is_an_error_of_one_line() -> None:
    """The worker's number and what to do, instead of the tracebacks of two processes."""
    loader = make_loader(Greedy(open_shards().split), workers=2)
    begin(loader, 2)
    limit(loader, resource.RLIMIT_AS, half_a_gigabyte_more)
    with pytest.raises(OSError, match=r"^loader worker [01] found no memory; lower data\.num_w.*$"):
        run_on(loader)


def test_a_worker_without_files_is_the_systems_error(tmp_path: Path) -> None:
    """With its number and the file that could not be opened; it is no bad image."""
    split = PackedSplit.open(str(copy_of_shards(tmp_path) / "train"))
    loader = make_loader(Noting(split), workers=2)
    begin(loader, 2)
    limit(loader, resource.RLIMIT_NOFILE, lambda _: 3)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.EMFILE}\] Too many open files: '.*'$"):
        run_on(loader)


class Refused(ShardReader):
    """A store whose keys have run out."""

    def read(self, number: int) -> bytes:
        """See Reader."""
        raise UsageError("cannot read it: the keys have expired")


def test_a_refusal_is_an_error_of_one_line() -> None:
    """As an error of the data is."""
    loader = make_loader(Refused(open_shards().split), workers=1)
    with pytest.raises(UsageError, match=r"^cannot read it: the keys have expired$"):
        run_on(loader)


def test_a_bug_in_a_worker_is_no_lack_of_memory() -> None:
    """It keeps its traceback."""
    loader = make_loader(Wrong(open_shards().split), workers=1)
    with pytest.raises(RuntimeError, match=r"Caught RuntimeError(.|\n)*a bug in sample"):
        run_on(loader)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which takes root")
def test_a_small_shared_memory_bounds_only_batches_that_are_kept() -> None:
    """With 400 kB of /dev/shm epochs run; who keeps every batch is told what is too small."""
    program = """
import sys
from pathlib import Path
from tests.make_shards import make_loader, open_shards
loader = make_loader(open_shards(Path(sys.argv[1])), workers=1, size=64)
for epoch in range(4):
    loader.set_epoch(epoch)
    assert sum(batch.images.nbytes for batch in loader) > 400_000
print("ran", flush=True)
kept = []
try:
    for epoch in range(4, 8):
        loader.set_epoch(epoch)
        kept += loader
except OSError as error:
    print(error)
"""
    shards = str(data_set() / "shards")
    mount = 'mount -t tmpfs -o size=400k none /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", program, shards],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    ran, told = done.stdout.splitlines()
    assert ran == "ran"
    assert told.startswith("no room in /dev/shm for a batch")
