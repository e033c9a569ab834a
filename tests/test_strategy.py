"""Processes that do not come together end with a line that says where and who."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import run

PROGRAM = """
import sys
import model.strategy
model.strategy.START_S = 2.0
model.strategy.PATIENCE_S = 1.0
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
    *before, last = done.stderr.splitlines()
    waited = f"rank 0 of 2 waits at 127.0.0.1:{port} for the others: were all started?"
    assert (waited in before) == (cause == "1/2 clients joined")
    assert f"error: rank {rank} of 2 could not meet the others at 127.0.0.1:{port} (" in last
    assert cause in last
    assert "Traceback" not in done.stderr


def test_none_is_left_where_the_port_is_anothers(small_recipe: Path, tmp_path: Path) -> None:
    """Rank 0 ends at once; rank 1, which it started, would wait for an answer for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = run(  # until nobody holds its output any more
            "train.py", "--config", small_recipe, "--run", tmp_path / "run", "--devices", 2,
            "trainer.batch_size=4", MASTER_PORT=str(server.getsockname()[1]),
        )  # fmt: skip
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
