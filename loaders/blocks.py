"""Blocks of memory that workers fill and the training process uses, lent for one batch each.

A fresh block for each batch would have to be cleared by the kernel, mapped by both processes and
handed over through a socket: a twentieth of a worker's time. Here each worker has a few blocks for
the run:

    worker            take() marks a block as lent; fills it; sends its number
    training process  sees the block as a tensor; when nothing refers to its memory, marks it free

A mark is a byte of the shared memory, set by the worker alone and cleared by the training process
alone. If all blocks are lent, because the user keeps batches, take() returns None.

The memory is a memfd. That is no file of /dev/shm (64 MB in a container by default), whose size
does not bound it; it counts as memory of the control group, as any other does.
"""

import errno
import mmap
import os
import weakref
from collections.abc import Callable
from itertools import count
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_PAGE = mmap.PAGESIZE
_FREE, _LENT = 0, 1
_IN_USE = 3
"""Batches of one worker that training holds at a time: at work, the one after, one in between."""
_LIMITS = {
    errno.ENOMEM: "ulimit -v, or the memory of the machine",
    errno.EFBIG: "ulimit -f",
    errno.EMFILE: "ulimit -n",
}
"""What sets the limit where the system says no to memory."""


def blocks_bytes(*, workers: int, prefetch: int, size: int) -> int:
    """The most memory that blocks of `size` bytes take: whole pages, and those of the marks."""
    number = workers * (prefetch + _IN_USE)
    return _start(number, number, size)


class Blocks:
    """Blocks of `size` bytes for workers that make `prefetch` batches ahead; none but on Linux.

    Memory that was never touched is not taken from the system.
    """

    def __init__(self, *, workers: int, prefetch: int, size: int) -> None:
        """Raises OSError, with the bytes that were asked for, where the system refuses them."""
        if not hasattr(os, "memfd_create"):
            workers = 0
        descriptor = -1
        whole = blocks_bytes(workers=workers, prefetch=prefetch, size=size)
        try:
            if workers:
                descriptor = os.memfd_create("shardstream-blocks")
                os.ftruncate(descriptor, whole)
            self._open(next(_keys), workers, prefetch + _IN_USE, size, descriptor)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            limit = _LIMITS.get(error.errno or 0, "the memory of the machine")
            raise OSError(
                f"cannot have {whole / 1e6:,.0f} MB of memory for the batches of {workers} loader "
                f"workers: {error.strerror}; lower data.num_workers, data.prefetch or "
                f"trainer.batch_size, or raise the limit ({limit})"
            ) from error
        _known[self._key] = self

    def _open(self, key: int, workers: int, each: int, size: int, descriptor: int) -> None:
        self._key, self._workers, self._each, self._size = key, workers, each, size
        self._descriptor = descriptor
        if workers:
            self._memory = mmap.mmap(descriptor, 0)
            weakref.finalize(self, os.close, descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        facts = (self._key, self._workers, self._each, self._size)
        return _opened, (*facts, DupFd(self._descriptor) if self._workers else None)

    def take(self, worker: int, shape: tuple[int, ...]) -> "Lent | None":
        """A block of this worker for a uint8 array of this shape; None if none is free."""
        first = worker * self._each
        last = first + self._each if worker < self._workers else first
        number = self._memory.find(bytes([_FREE]), first, last) if last > first else -1
        if number < 0:
            return None
        self._memory[number] = _LENT
        return Lent(self, number, shape)

    def array(self, number: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """The beginning of a block, uninitialized."""
        offset = _start(number, self._workers * self._each, self._size)
        return np.ndarray(shape, np.uint8, self._memory, offset)

    def give_back(self, number: int) -> None:
        """Mark a block as free. The last thing done with it."""
        self._memory[number] = _FREE


class Lent:
    """A block in its worker. What arrives in the training process is a tensor."""

    def __init__(self, blocks: Blocks, number: int, shape: tuple[int, ...]) -> None:
        self._blocks, self._number, self._shape = blocks, number, shape
        self._sent = False

    def numpy(self) -> npt.NDArray[np.uint8]:
        """The block's memory."""
        return self._blocks.array(self._number, self._shape)

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        self._sent = True
        return _received, (self._blocks._key, self._number, self._shape)  # noqa: SLF001

    def __del__(self) -> None:
        if not self._sent:  # its batch failed
            self._blocks.give_back(self._number)


_keys = count()
_known: weakref.WeakValueDictionary[int, Blocks] = weakref.WeakValueDictionary()


def _start(number: int, blocks: int, size: int) -> int:
    """Where a block begins: behind the page or pages of marks, on a page of its own."""
    return -(-blocks // _PAGE) * _PAGE + number * -(-size // _PAGE) * _PAGE


def _opened(key: int, workers: int, each: int, size: int, descriptor: Any) -> Blocks:
    """Blocks in a worker."""
    blocks = Blocks.__new__(Blocks)
    blocks._open(key, workers, each, size, descriptor.detach() if descriptor else -1)  # noqa: SLF001
    return blocks


def _received(key: int, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A worker's block as a tensor, which gives it back with its last reference."""
    blocks = _known[key]
    array = blocks.array(number, shape)
    weakref.finalize(array, blocks.give_back, number).atexit = False
    return torch.from_numpy(array)
