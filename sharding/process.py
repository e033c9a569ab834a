"""How our worker processes live and die."""

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

# A fork starts in milliseconds, with what the parent has read and planned already in place. What
# must not cross it (CUDA, S3 clients) is made after it. Elsewhere than on Linux forks are fragile.
FORK = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def worker_process(parent: int) -> None:
    """Make this process a worker of `parent`: deaf to Ctrl-C and SIGTERM, gone when it is gone.

    The parent decides when to stop and tells its workers by their queues. A signal sent to the
    whole process group must not kill a worker under its parent's hands, and a parent killed with
    SIGKILL must not leave workers that still write to its output.

    `parent` is the pid of the process that forked this one, taken before the fork.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between our fork and the call above
        os._exit(1)
