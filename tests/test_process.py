"""Processes: workers are deaf to signals of the group, and die with their parent."""

import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="says what holds on Linux")

START = """
    import os, signal
    from concurrent.futures import ProcessPoolExecutor
    from sharding.process import WORKERS, start_worker

    def pool():
        return ProcessPoolExecutor(
            2, mp_context=WORKERS, initializer=start_worker, initargs=(os.getpid(),)
        )
"""


@contextmanager
def running(script: str) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """A process that runs a script, which has `pool`, and its output; it is killed at the end."""
    line = [sys.executable, "-c", textwrap.dedent(START) + textwrap.dedent(script)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        try:
            yield parent, parent.stdout
        finally:
            parent.kill()


def test_workers_die_with_a_killed_parent() -> None:
    """SIGKILL of the parent ends its workers at once, although they are busy."""
    script = """
        def busy(_):
            os.write(1, b"%d\\n" % os.getpid())
            signal.pause()

        with pool() as workers:
            list(workers.map(busy, range(2)))
    """
    with running(script) as (parent, out):
        workers = [os.pidfd_open(int(out.readline())) for _ in range(2)]
        parent.kill()
        for worker in workers:
            assert select.select([worker], [], [], 10)[0] == [worker]  # it has ended
            os.close(worker)


def test_workers_are_deaf() -> None:
    """SIGINT, SIGTERM and SIGUSR1, which launchers send to whole groups, do not end a worker."""
    script = """
        def answer(name):
            os.kill(os.getpid(), name)
            return signal.Signals(name).name

        with pool() as workers:
            print(*workers.map(answer, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]))
    """
    with running(script) as (_, out):
        assert out.read() == "SIGINT SIGTERM SIGUSR1\n"


def test_deaf_workers_can_be_ended() -> None:
    """What multiprocessing calls to end a worker (at exit, after a crash) works on a deaf one."""
    script = """
        def deaf(parent, started):
            start_worker(parent)
            started.set()
            signal.pause()

        started = WORKERS.Event()
        worker = WORKERS.Process(target=deaf, args=(os.getpid(), started))
        worker.start()
        started.wait()
        worker.terminate()
        worker.join()
        print(worker.exitcode)
    """
    with running(script) as (_, out):
        assert out.read() == f"{-signal.SIGKILL}\n"


def test_parent_gone_before_the_start() -> None:
    """A worker whose parent died before it could ask to die with it ends at once."""
    with running("start_worker(0); print('went on')") as (parent, out):
        assert (out.read(), parent.wait()) == ("", 1)
