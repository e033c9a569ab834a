"""Executors: the same results from this process, from forked ones, and from Dask's."""

import os
import signal
from pathlib import Path

import pytest

from sharding.errors import DataError, UsageError
from sharding.executors import open_map


def square(number: int) -> int:
    """A task."""
    return number * number


def fail_at_three(number: int) -> int:
    """A task that fails once."""
    if number == 3:
        raise DataError("three")
    return number


def die_once(place: str) -> int:
    """A task whose worker is killed, the first time."""
    try:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return os.getpid()
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


WHERE = [(1, None), (2, None), (2, "local")]


@pytest.mark.filterwarnings("ignore")  # Dask's own, of its event loops and sockets
@pytest.mark.parametrize(("workers", "cluster"), WHERE)
def test_results_and_errors(workers: int, cluster: str | None) -> None:
    """Every task's result comes once; a task's error arrives as it was raised."""
    with open_map(workers=workers, cluster=cluster) as map_:
        assert sorted(map_(square, list(range(20)))) == [n * n for n in range(20)]
        with pytest.raises(DataError, match=r"^three$"):
            list(map_(fail_at_three, list(range(20))))


@pytest.mark.filterwarnings("ignore")
def test_dask_starts_the_task_of_a_lost_worker_again(tmp_path: Path) -> None:
    """A worker killed in a task costs nothing but time."""
    with open_map(workers=2, cluster="local") as map_:
        (result,) = map_(die_once, [str(tmp_path / "died")])
    assert result > 0


def test_a_killed_local_worker_is_an_error(tmp_path: Path) -> None:
    """Local processes are not replaced: the packer ends and is started again."""
    with pytest.raises(ChildProcessError), open_map(workers=2) as map_:
        list(map_(die_once, [str(tmp_path / "died")] * 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cluster", ["tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1:1"])
def test_no_scheduler(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address without a scheduler is named."""
    monkeypatch.setattr("sharding.executors.CONNECT_S", 1)
    with pytest.raises(UsageError, match=f"cannot reach a Dask scheduler at {cluster}"):
        open_map(workers=1, cluster=cluster).__enter__()
