"""How our worker processes live and die."""

import ctypes
import multiprocessing
import multiprocessing.context
import multiprocessing.popen_fork
import multiprocessing.process
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


class _Popen(multiprocessing.popen_fork.Popen):
    """Workers are deaf to SIGTERM, so who ends one (torch, or multiprocessing at exit) kills it."""

    def terminate(self) -> None:
        self.kill()


class _WorkerProcess(multiprocessing.context.ForkProcess):
    @staticmethod
    def _Popen(process_obj: multiprocessing.process.BaseProcess) -> _Popen:  # noqa: N802 (its name)
        return _Popen(process_obj)


class _WorkerContext(multiprocessing.context.ForkContext):
    Process = _WorkerProcess


# A fork starts in milliseconds, with what its parent has read and planned in place. What must not
# cross it (CUDA, S3 clients) is made after it. Elsewhere than on Linux, forks are fragile.
WORKERS: multiprocessing.context.BaseContext = (
    _WorkerContext() if sys.platform == "linux" else multiprocessing.get_context("spawn")
)


def start_worker(parent: int) -> None:
    """Make this process a worker of `parent`: deaf to Ctrl-C and SIGTERM, gone when it is gone.

    A signal that goes to a whole process group must not kill workers under their parent's hands:
    the parent decides when to stop. And a parent killed with SIGKILL must not leave workers that
    still write to its output (on Linux; elsewhere they find their queue closed).

    `parent` is the pid of the process that starts this one, taken before the start.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between our start and the call above
        os._exit(1)
