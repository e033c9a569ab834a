"""Reads a worker's samples, ahead of decoding where reads are slow.

A read from the page cache takes some microseconds, and handing it to a thread would cost more. A
read from a network file system takes a millisecond, one from S3 thirty: then threads read the next
batch while this one is decoded, each going on with the next sample that nobody has taken. Which of
the two it is, and how many threads it takes, is measured in each batch.
"""

import errno
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from queue import SimpleQueue
from typing import TypeVar

from loaders.reader import Reader
from sharding.streams import Integers

THREADS = 16
SLOW_S = 200e-6
"""For a read, on average; above that threads are worth their cost."""
_EACH_S = 250e-6
"""As many threads are used as bring a sample in this time, a third of what decoding it takes."""

_REMEDY = "raise the limit of processes (`ulimit -u`, pids.max), or lower data.num_workers"

P = TypeVar("P")
Read = Callable[[int], bytes]
"""Sample number -> checked bytes. Raises what Reader.read does."""


class ReadAhead:
    """Pairs planned batches with the way to read their samples."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._slow = reader.remote
        self._threads = THREADS
        self._has_threads = False
        self._seconds: list[float] = []
        """Of each read since they were last looked at."""

    def batches(
        self, plan: Iterable[P], numbers_of: Callable[[P], Integers]
    ) -> Iterator[tuple[P, Read]]:
        """Yield each item of the plan with its reads.

        While they are slow the next item's are begun. What it takes to open is opened, in any case.
        """
        waiting: tuple[P, Read] | None = None
        begun: deque[_Begun] = deque(maxlen=2)
        try:
            for number, planned in enumerate(plan):
                self._look_at_speed()
                numbers = numbers_of(planned)
                read: Read = self._timed
                if self._slow:
                    read = _Begun(numbers.tolist(), self._timed)
                    begun.append(read)
                    try:
                        self._in_threads(read.work, min(self._threads, len(numbers)))
                    except OSError as error:
                        read.fail(error)
                else:
                    for opening in self._reader.unopened(numbers):
                        with suppress(OSError):  # then it is opened when it is read
                            self._in_threads(opening)
                if number == 0 and not self._slow:  # by which the speed gets known
                    yield planned, read
                    continue
                if waiting is not None:
                    yield waiting
                waiting = planned, read
            if waiting is not None:
                yield waiting
        finally:  # an error, or the end: nobody will ask for the rest
            for reads in begun:
                reads.leave()

    def _in_threads(self, work: Callable[[], None], times: int = 1) -> None:
        try:
            for _ in range(times):
                self._pool.submit(work)
                self._has_threads = True
        except RuntimeError as error:
            if not self._has_threads:  # else those that there are do it all
                raise OSError(errno.EAGAIN, f"{error}; {_REMEDY}") from error

    def _timed(self, number: int) -> bytes:
        begin = time.perf_counter()
        data = self._reader.read(number)
        self._seconds.append(time.perf_counter() - begin)
        return data

    def _look_at_speed(self) -> None:
        seconds, self._seconds = self._seconds, []
        if seconds:
            each = sum(seconds) / len(seconds)
            self._slow = each > SLOW_S
            self._threads = min(math.ceil(each / _EACH_S), THREADS)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")


class _Begun:
    """The reads of one batch, which threads do; called, it waits for one of them."""

    def __init__(self, numbers: list[int], read: Read) -> None:
        self._read = read
        self._todo = deque(dict.fromkeys(numbers))
        self._coming: SimpleQueue[tuple[int, bytes | Exception]] = SimpleQueue()
        self._came: dict[int, bytes | Exception] = {}

    def fail(self, error: OSError) -> None:
        """Nobody reads them: say so where the first one is asked for."""
        self._came.update(dict.fromkeys(self._todo, error))

    def leave(self) -> None:
        """Begin no more of them."""
        self._todo.clear()

    def work(self) -> None:
        """Read what no other thread has taken yet."""
        while self._todo:
            try:
                number = self._todo.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                self._coming.put((number, self._read(number)))
            except Exception as error:  # noqa: BLE001  (raised where the sample is asked for)
                self._coming.put((number, error))

    def __call__(self, number: int) -> bytes:
        while number not in self._came:
            self._came.update([self._coming.get()])
        result = self._came[number]
        if isinstance(result, Exception):
            raise result
        return result
