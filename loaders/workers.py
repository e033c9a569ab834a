"""The worker processes of a loader: started once, fed by a plan, gone with the loader."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from loaders.pipeline import Batch, Made
from sharding.process import FROM_SERVER, start_served_worker, start_server


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

    def restart(self) -> None:
        """Begin the plan anew. Workers stay; what they made ahead is dropped."""
        self._stream = iter(self._loader)

    def next(self, tag: int) -> Batch:
        """The next batch of the plan, which must have this tag.

        Raises the error that a worker met in its place, ChildProcessError if one was killed.
        """
        try:
            made = next(self._stream, None)
        except (EOFError, ConnectionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                "a loader worker was killed (out of memory, or /dev/shm too small?); give it fewer "
                "workers or smaller batches, and resume"
            ) from error
        assert made is not None, f"asked for batch {tag}, got the plan's end"
        assert made.tag == tag, f"asked for batch {tag}, got {made.tag}"
        if isinstance(made.batch, Exception):
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


def _start_worker(worker: int) -> None:
    del worker
    start_served_worker()


def _as_it_is(made: Made) -> Made:
    return made
