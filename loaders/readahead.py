"""Reads a worker's samples, ahead of decoding where reads are slow.

A read from the page cache takes some microseconds, and handing it to a thread would cost more. A
read from a network file system takes a millisecond, one from S3 thirty: then threads read the next
batch while this one is decoded, each going on with the next sample that nobody has taken. Which of
the two it is, and how many threads it takes, is measured in each batch.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from queue import SimpleQueue
from typing import TypeVar

from loaders.reader import Reader
from sharding.streams import Integers

THREADS = 16
SLOW_SECONDS = 200e-6
"""For a read, on average; above that threads are worth their cost."""
_EACH_SECONDS = 250e-6
"""As many threads are used as bring a sample in this time, a third of what decoding it takes."""

P = TypeVar("P")
Read = Callable[[int], bytes]
"""Sample number -> checked bytes. Raises what Reader.read does."""


class ReadAhead:
    """Pairs planned batches with the way to read their samples."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._slow = reader.remote
        self._threads = THREADS
        self._seconds: list[float] = []
        """Of each read since they were last looked at."""

    def batches(
        self, plan: Iterable[P], numbers_of: Callable[[P], Integers]
    ) -> Iterator[tuple[P, Read]]:
        """Yield each item of the plan with its reads.

        While they are slow the next item's are begun. What it takes to open is opened, in any case.
        """
        waiting: tuple[P, Read] | None = None
        for number, planned in enumerate(plan):
            self._look_at_speed()
            numbers = numbers_of(planned)
            read: Read = self._timed
            if self._slow:
                read = _Begun(numbers.tolist(), self._timed, self._pool, self._threads)
            else:
                for opening in self._reader.unopened(numbers):
                    self._pool.submit(opening)
            if number == 0 and not self._slow:  # by which the speed gets known
                yield planned, read
                continue
            if waiting is not None:
                yield waiting
            waiting = planned, read
        if waiting is not None:
            yield waiting

    def _timed(self, number: int) -> bytes:
        begin = time.perf_counter()
        data = self._reader.read(number)
        self._seconds.append(time.perf_counter() - begin)
        return data

    def _look_at_speed(self) -> None:
        seconds, self._seconds = self._seconds, []
        if seconds:
            each = sum(seconds) / len(seconds)
            self._slow = each > SLOW_SECONDS
            self._threads = min(math.ceil(each / _EACH_SECONDS), THREADS)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")


class _Begun:
    """The reads of one batch, begun in threads; called, it waits for one of them."""

    def __init__(
        self, numbers: list[int], read: Read, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        self._todo = deque(dict.fromkeys(numbers))
        self._coming: SimpleQueue[tuple[int, bytes | Exception]] = SimpleQueue()
        self._came: dict[int, bytes | Exception] = {}
        for _ in range(min(threads, len(self._todo))):
            pool.submit(self._work, read)

    def _work(self, read: Read) -> None:
        while self._todo:
            try:
                number = self._todo.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                self._coming.put((number, read(number)))
            except Exception as error:  # noqa: BLE001  (raised where the sample is asked for)
                self._coming.put((number, error))

    def __call__(self, number: int) -> bytes:
        while number not in self._came:
            self._came.update([self._coming.get()])
        result = self._came[number]
        if isinstance(result, Exception):
            raise result
        return result
