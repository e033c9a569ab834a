"""loaders/preload.py: what the fork server is, apart from imports."""

import os
import signal
from pathlib import Path

import pytest

from tests.make_shards import make_loader


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_workers_of_a_signalled_server_go_on(name: str) -> None:
    """A signal to the whole process group must not end the server: its end is its workers' end."""
    loader = make_loader(workers=1)
    stream = iter(loader)
    next(stream)
    # The worker's parent is the server.
    (worker,) = loader._workers._loader.pipeline[0]._iterator._workers
    status = Path(f"/proc/{worker.pid}/stat").read_text()
    server = int(status.rpartition(")")[2].split()[1])
    assert server != os.getpid()
    os.kill(server, getattr(signal, name))
    assert len(list(stream)) == len(loader) - 1
    assert worker.is_alive()
