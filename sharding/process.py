"""How worker processes start, and how they end.

Two kinds of start. A packer has one thread and forks: milliseconds, nothing to pickle. A training
process has many threads (autograd, gloo, CUDA), and a fork under them can deadlock in the child
before it has run a line (seen here under load: once in a dozen starts of a DDP run); its workers
are forked by a server process that has a single thread and has imported what they need.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import (
    connection,
    context,
    forkserver,
    popen_fork,
    popen_forkserver,
    process,
    resource_tracker,
)
from typing import Any

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


# Workers are deaf to SIGTERM. So that whoever ends one (torch, a process pool, multiprocessing at
# exit) really does, `terminate` kills in both kinds.
class _ForkPopen(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()


class _ForkProcess(context.ForkProcess):
    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _ForkPopen:  # noqa: N802 (its name)
        return _ForkPopen(process_obj)


class _Fork(context.ForkContext):
    Process = _ForkProcess


FORK: context.BaseContext = (
    _Fork() if sys.platform == "linux" else multiprocessing.get_context("spawn")
)


class _ServedPopen(popen_forkserver.Popen):
    def terminate(self) -> None:
        self.kill()

    def _launch(self, process_obj: process.BaseProcess) -> None:
        """Start the process without the main module, which it would import anew for seconds."""
        main: Any = sys.modules["__main__"]
        hidden = {
            name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)
        }
        main.__spec__ = None
        try:
            super()._launch(process_obj)  # type: ignore[misc]  # not in typeshed
        finally:
            vars(main).update(hidden)


class _ServedProcess(context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _ServedPopen:  # noqa: N802 (its name)
        return _ServedPopen(process_obj)


class _FromServer(context.ForkServerContext):
    """The fork server, whose processes must not need anything defined in the main module."""

    Process = _ServedProcess


FROM_SERVER = _FromServer()


def start_server(preload: str) -> None:
    """Let the fork server start and import the module `preload`, while we do something else."""
    FROM_SERVER.set_forkserver_preload([preload])
    with _signals_blocked():
        resource_tracker.ensure_running()
    with _signals_blocked():  # the tracker's start has let SIGTERM and Ctrl-C through again
        forkserver.ensure_running()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Let what is started here be deaf: it inherits the mask. What comes meanwhile comes later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_forked_worker(parent: int) -> None:
    """Make this process, forked by `parent`, deaf to signals and gone when its parent is gone.

    A signal that goes to a whole process group must not kill workers under their parent's hands:
    the parent decides when to stop. And a parent killed with SIGKILL must not leave workers that
    still write to its output.
    """
    ignore_signals()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between our start and the call above
        os._exit(1)


def start_served_worker() -> None:
    """The same for a process of the fork server, which is not a child of the one it works for."""
    ignore_signals()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def ignore_signals() -> None:
    """Be deaf to Ctrl-C, SIGTERM and SIGUSR1."""
    for name in _SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked workers for the length of a block; after an error the tasks begun are ended.

    Raises ChildProcessError when a worker was killed.
    """
    pool = ProcessPoolExecutor(
        workers, mp_context=FORK, initializer=start_forked_worker, initargs=(os.getpid(),)
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, most likely by the kernel for memory (see dmesg); start "
            "the same command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
