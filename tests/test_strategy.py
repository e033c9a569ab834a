"""Processes that do not come together end with a line that says where and who."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import model.strategy
model.strategy.START_S = 2.0
import train
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("rank", "taken", "cause"),
    [
        (0, False, "1/2 clients joined"),
        (0, True, "address already in use"),
        (1, False, "timed out"),
    ],
)
def test_a_rank_that_is_alone(
    small_recipe: Path, tmp_path: Path, rank: int, taken: bool, cause: str
) -> None:
    """The first one waits for the others, these for the first; or its port is another's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        if not taken:
            server.close()
        done = subprocess.run(
            [
                *(sys.executable, "-c", PROGRAM, "--config", str(small_recipe)),
                *("--run", str(tmp_path / "run"), "--nodes", "2", "--devices", "1"),
                "trainer.timeout_s=2",
            ],
            cwd=Path(__file__).parents[1],
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            | {"NODE_RANK": str(rank), "RANK": str(rank), "LOCAL_RANK": "0"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"error: rank {rank} of 2 could not meet the others at 127.0.0.1:{port} (" in last
    assert cause in last
    assert "Traceback" not in done.stderr
