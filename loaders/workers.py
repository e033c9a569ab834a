"""The worker processes of a loader: started once, fed by a plan, gone with the loader."""

import errno
import os
import re
import signal
import weakref
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from loaders.machine import oom_kills
from loaders.pipeline import Batch, Made
from sharding.process import FROM_SERVER, start_served_worker, start_server

_LESS = "lower data.num_workers, data.prefetch or trainer.batch_size, or raise the memory's limit"
_MORE_SHM = "make it larger: docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm"
_DEATH_S = 5.0  # for the end of a process that broke its pipe to be known
# numpy's own kind of MemoryError comes as torch's RuntimeError.
_NO_MEMORY = re.compile(r"Caught \w*MemoryError in DataLoader worker process (\d+)")
_FULL = ("No space left on device", "Cannot allocate memory")


def worker_place() -> tuple[int, int]:
    """This worker's number and how many there are; (0, 1) in the process that iterates."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class Workers:
    """Runs a pipeline in worker processes, or in this process for 0 workers."""

    def __init__(self, pipeline: wds.DataPipeline, *, workers: int, prefetch: int) -> None:
        """prefetch: batches that each worker makes ahead."""
        parallel: dict[str, Any] = {}
        if workers:
            start_server("loaders.preload")
            parallel = {
                "multiprocessing_context": FROM_SERVER,
                "persistent_workers": True,
                "prefetch_factor": prefetch,
                "worker_init_fn": _start_worker,
            }
        self._loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # without it each start would draw from the global one
            **parallel,
        )
        self._stream: Iterator[Made] = iter(())
        self._oom_kills = oom_kills()

    def restart(self) -> None:
        """Begin the plan anew. Workers stay; what they made ahead is dropped."""
        self._stream = iter(self._loader)

    def next(self, tag: int) -> Batch:
        """The next batch of the plan, which must have this tag.

        Raises the error that a worker met in its place, ChildProcessError, which names the worker,
        if one was killed, OSError if memory or files were not enough.
        """
        try:
            made = next(self._stream, None)
        except (EOFError, OSError, RuntimeError, MemoryError) as error:
            explained = _shortage(error)
            if explained is None and _broke_off(error):
                explained = ChildProcessError(self._obituary())
            if explained is None:
                raise
            raise explained from error
        assert made is not None, f"asked for batch {tag}, got the plan's end"
        assert made.tag == tag, f"asked for batch {tag}, got {made.tag}"
        if isinstance(made.batch, Exception):
            # Whoever asks on restarts. Kept, the stream would hold the error, the error by its
            # traceback the loader, and the loader would never be collected.
            self._stream = iter(())
            raise made.batch
        return made.batch

    def close_with(self, owner: object) -> None:
        """End the workers when `owner` is collected, or at the interpreter's exit.

        torch ends workers when their iterator is deleted; one that is still referred to at exit
        (from a traceback, say) would leave them to multiprocessing, whose kill torch reports as a
        crash.
        """
        weakref.finalize(owner, self._close)

    def _close(self) -> None:
        self._stream = iter(())
        self._loader.close()

    def _obituary(self) -> str:
        """What became of which workers."""
        # torch tells the ids of those that ended, not how.
        processes: list[BaseProcess] = getattr(self._loader.pipeline[0]._iterator, "_workers", [])  # noqa: SLF001
        connection.wait([process.sentinel for process in processes], _DEATH_S)
        kills = oom_kills() - self._oom_kills
        ended = [
            f"loader worker {number} (process {process.pid}) {_ending(process.exitcode, kills)}"
            for number, process in enumerate(processes)
            if process.exitcode is not None
        ]
        return "; ".join(ended) or "the loader's workers cannot be reached any more; resume"


def _ending(status: int, kills: int) -> str:
    """PURE: how a worker ended, why probably, and what to do. status: as multiprocessing's.

    kills: how many processes the kernel has killed for memory since the loader was made.
    """
    if status >= 0:
        return f"ended with status {status}; what it said before tells why"
    name = signal.Signals(-status).name
    if -status == signal.SIGKILL:
        cause = (
            f"was killed for memory, most likely: since the loader was made the kernel has done so "
            f"to {kills} of the machine's processes"
            if kills
            else "was killed (SIGKILL): by the kernel for memory (dmesg tells), or by somebody"
        )
        return f"{cause}; {_LESS}, and resume"
    if -status == signal.SIGBUS:
        return f"had no memory for its batch (SIGBUS); {_LESS}, and resume"
    return f"crashed ({name}); data.decoder=pillow does without our decoder in C, then resume"


def _shortage(error: Exception) -> OSError | None:
    """What the text of torch's error says about memory or files; None if nothing."""
    text = (str(error).splitlines() or [""])[-1]  # above it stands a traceback
    if worker := _NO_MEMORY.match(str(error)):
        return OSError(f"loader worker {worker[1]} found no memory; {_LESS}, and resume")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return OSError(f"no room in /dev/shm for the locks between processes; {_MORE_SHM}")
    if isinstance(error, RuntimeError):
        if "Too many open files" in text or "ancdata" in text:  # see torch's dataloader.py
            return OSError(errno.EMFILE, os.strerror(errno.EMFILE), "loader workers' batches")
        if "shared memory" in text or ("/torch_" in text and any(full in text for full in _FULL)):
            return OSError(
                "no room in /dev/shm for a batch (those that training keeps lie there); keep fewer "
                f"batches, or {_MORE_SHM}"
            )
    return None


def _broke_off(error: Exception) -> bool:
    """Whether a worker is no more, rather than having met an error, which it hands over."""
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in str(error) or "killed by signal" in str(error)
    return isinstance(error, (EOFError, ConnectionError))


def _start_worker(worker: int) -> None:
    del worker
    start_served_worker()


def _as_it_is(made: Made) -> Made:
    return made
