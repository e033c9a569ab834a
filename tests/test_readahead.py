"""ReadAhead: every read's bytes or error at its own place, threads only where reads are slow."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from loaders import readahead
from loaders.readahead import THREADS, ReadAhead
from loaders.reader import ShardReader
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.store import Blob
from sharding.streams import Integers
from tests.make_shards import open_shards


class Slow(ShardReader):
    """Takes a while for each read, and notes who read and how many did at a time."""

    def __init__(self, *, seconds: float, remote: bool = False) -> None:
        super().__init__(open_shards().split)
        self.seconds, self.remote = seconds, remote
        self.threads: list[str] = []
        self.now = self.most = 0

    def read(self, number: int) -> bytes:
        """See Reader."""
        self.threads.append(threading.current_thread().name)
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        self.now -= 1
        if number == 99:
            raise DataError("ninety-nine")
        return super().read(number)


BATCHES = [[0, 1, 2], [5, 3], [9], [8, 7, 6, 4], [10, 11]]


def run(reader: Slow) -> list[list[bytes]]:
    """What comes for BATCHES."""
    plan = map(np.array, BATCHES)
    return [
        [read(number) for number in numbers.tolist()]
        for numbers, read in ReadAhead(reader).batches(plan, lambda numbers: numbers)
    ]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("seconds", [0, 0.002])
def test_order_and_bytes(seconds: float, remote: bool) -> None:
    """However long reads take, each batch comes in its turn with the bytes of its samples."""
    plain = open_shards()
    expected = [[plain.read(number) for number in numbers] for numbers in BATCHES]
    assert run(Slow(seconds=seconds, remote=remote)) == expected


def test_threads_only_for_slow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick reads stay with the caller; slow ones go to threads from the second batch on."""
    monkeypatch.setattr(readahead, "SLOW_S", 0.1)
    quick = Slow(seconds=0)
    run(quick)
    assert set(quick.threads) == {threading.current_thread().name}
    monkeypatch.setattr(readahead, "SLOW_S", 0.0005)
    slow = Slow(seconds=0.002)
    run(slow)
    first = len(BATCHES[0])
    assert set(slow.threads[:first]) == {threading.current_thread().name}
    assert all(name.startswith("read-ahead") for name in slow.threads[first:])
    assert 1 < slow.most <= THREADS


def test_remote_reads_are_parallel_from_the_first_batch() -> None:
    """A first batch from S3 does not wait for its samples one after the other."""
    reader = Slow(seconds=0.02, remote=True)
    plan = iter([np.arange(12)])
    ((_, read),) = ReadAhead(reader).batches(plan, lambda numbers: numbers)
    for number in range(12):
        read(number)
    assert reader.most > 4


def test_it_is_one_batch_ahead_and_no_more() -> None:
    """While a batch is used the next is read, and not the one after."""
    reader = Slow(seconds=0, remote=True)
    taken: list[int] = []

    def plan() -> Iterator[Integers]:
        for number in range(5):
            taken.append(number)
            yield np.array([number])

    for at, (_, read) in enumerate(ReadAhead(reader).batches(plan(), lambda numbers: numbers)):
        if reader.remote and at == 0:
            reader.seconds = 0.002  # stay slow
        assert len(taken) <= at + 2
        read(at)


def test_an_error_comes_where_its_sample_is_asked_for() -> None:
    """A failed read of the next batch does not disturb this one."""
    plan = map(np.array, [[0, 1], [2, 99], [3]])
    reader = Slow(seconds=0.002, remote=True)
    batches = ReadAhead(reader).batches(plan, lambda numbers: numbers)
    assert [read(number) for numbers, read in [next(batches)] for number in (0, 1)]
    _, read = next(batches)
    assert read(2)
    with pytest.raises(DataError, match="ninety-nine"):
        read(99)
    _, read = next(batches)
    assert read(3)


def test_shards_are_opened_before_their_samples_are_needed() -> None:
    """By a thread, while the batch before is used; each once."""
    opened: list[tuple[int, str]] = []
    begun = threading.Event()

    class Noting(PackedSplit):
        def open_tar(self, shard: int) -> Blob:
            opened.append((shard, threading.current_thread().name))
            if shard == 1:
                begun.set()
            return super().open_tar(shard)

    split = open_shards().split
    reader = ShardReader(Noting(store=split.store, manifest=split.manifest))
    batches = ReadAhead(reader).batches(
        map(np.array, [[0], [1, 2], [7, 8]]), lambda numbers: numbers
    )
    _, read = next(batches)
    assert read(0)
    _, read = next(batches)
    assert begun.wait(30), "the next batch's shard was not opened while this one is used"
    assert [read(1), read(2)]
    _, read = next(batches)
    assert [read(7), read(8)]
    assert [shard for shard, _ in opened] == [0, 1]
    assert opened[1][1].startswith("read-ahead")


def test_who_does_not_ask_for_more_is_not_read_for() -> None:
    """Behind an error, or at the end: reads that have begun end, and no other begins."""
    go_on = threading.Event()
    begun: list[int] = []

    class Held(ShardReader):
        def read(self, number: int) -> bytes:
            begun.append(number)
            assert go_on.wait(30)
            return super().read(number)

    reader = Held(open_shards().split)
    reader.remote = True
    ahead = ReadAhead(reader)
    batches = ahead.batches(iter([np.arange(40)]), lambda numbers: numbers)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    go_on.set()
    ahead._pool.shutdown()
    assert 0 < len(begun) <= THREADS


def test_without_a_single_thread_there_is_a_remedy_and_with_one_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the container's limit of processes is reached."""
    start = threading.Thread.start
    allowed = [0]

    def limited(thread: threading.Thread) -> None:
        allowed[0] -= 1
        if allowed[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(OSError, match=r"can't start new thread; raise .*ulimit -u.*num_workers"):
        run(Slow(seconds=0.002, remote=True))
    allowed[0] = 2
    plain = open_shards()
    expected = [[plain.read(number) for number in numbers] for numbers in BATCHES]
    slow = Slow(seconds=0.002, remote=True)
    assert run(slow) == expected
    assert slow.most <= 2


def test_an_error_of_the_first_thread_comes_with_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of reads do, so that a worker hands it on; the batches go on behind it."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reader = Slow(seconds=0, remote=True)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        batches = ReadAhead(reader).batches(map(np.array, [[0, 1], [2]]), lambda numbers: numbers)
        for numbers, read in batches:
            with pytest.raises(OSError, match="can't start new thread; raise"):
                read(int(numbers[0]))
