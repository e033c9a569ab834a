"""Processes: workers are deaf to signals of the group, and die with who started them."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from sharding.process import start_forked_worker, start_served_worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="says what holds on Linux")

PROGRAM = """
import os, sys
from sharding.process import FORK, FROM_SERVER
from tests.test_process import forked, served

if sys.argv[1] == "forked":
    worker = FORK.Process(target=forked, args=(os.getpid(),))
else:
    worker = FROM_SERVER.Process(target=served)
worker.start()
sys.stdin.read()
worker.terminate()
worker.join()
print(worker.exitcode)
"""


def live() -> None:
    """Get the signals that launchers send to whole groups, then say that one is alive, and wait."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), name)
    os.write(1, b"%d\n" % os.getpid())
    signal.pause()


def forked(parent: int) -> None:
    """Work as a packer's worker."""
    start_forked_worker(parent)
    live()


def served() -> None:
    """Work as a loader's worker."""
    start_served_worker()
    live()


@contextmanager
def program(kind: str) -> Iterator[tuple["subprocess.Popen[str]", IO[str], IO[str]]]:
    """A process with a worker of this kind, its input and its output; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        try:
            yield parent, parent.stdin, parent.stdout
        finally:
            parent.kill()


@pytest.mark.parametrize("kind", ["forked", "served"])
def test_workers_are_deaf_and_die_with_their_parent(kind: str) -> None:
    """A worker lives through a group's signals; SIGKILL of its parent ends it, busy as it is."""
    with program(kind) as (parent, _, out):
        worker = os.pidfd_open(int(out.readline()))
        parent.kill()
        assert select.select([worker], [], [], 10)[0] == [worker]  # it has ended
        os.close(worker)


@pytest.mark.parametrize("kind", ["served"])
def test_deaf_workers_can_be_ended(kind: str) -> None:
    """What multiprocessing calls to end a worker (at exit, after a crash) works on a deaf one."""
    with program(kind) as (_, into, out):
        out.readline()
        into.close()
        assert out.readline() == f"{-signal.SIGKILL}\n"


def test_parent_gone_before_the_start() -> None:
    """A worker whose parent died before it could ask to die with it ends at once."""
    line = "from sharding.process import *; start_forked_worker(0); print('went on')"
    run = subprocess.run([sys.executable, "-c", line], capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (1, b"")
