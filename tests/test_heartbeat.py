"""model/heartbeat.py: ranks as threads of one process, on a real store."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from model import beats, heartbeat
from model.heartbeat import Heartbeat
from tests.ports import free_port


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the times."""
    for name in ("BEAT", "LINGER", "LAST_WORDS"):
        monkeypatch.setattr(heartbeat, name, getattr(heartbeat, name) / 10)
    for module in (heartbeat, beats):
        monkeypatch.setattr(module, "PATIENCE", beats.PATIENCE / 10)


class Rank:
    """A rank's heart, what it said, and the status with which it would have ended."""

    def __init__(
        self, connect: Callable[[], TCPStore], rank: int, world: int, **options: float
    ) -> None:
        self.said: list[str] = []
        self.status: int | None = None
        self.ended = threading.Event()
        self.heart = Heartbeat(
            connect(),
            rank=rank,
            world=world,
            local_rank=rank,
            timeout_s=options.get("timeout_s", 30.0),
            complain=self.said.append,
            exit_process=self._end,
        )

    def _end(self, status: int) -> None:
        self.status = status
        self.ended.set()

    def stop(self) -> None:
        """As SIGSTOP would: it says nothing any more."""
        self.heart._gone.set()


@pytest.fixture
def store() -> Iterator[Callable[[], TCPStore]]:
    """Connects to a store; the first one that connects holds it."""
    port = free_port()
    limit = timedelta(seconds=10)
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=limit)
    yield lambda: TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit
    )
    del server


def started(connect: Callable[[], TCPStore], world: int, **options: float) -> list[Rank]:
    """All ranks, under way."""
    ranks = [Rank(connect, rank, world, **options) for rank in range(world)]
    for rank in ranks:
        rank.heart.start()
    return ranks


def leave(ranks: list[Rank]) -> None:
    """All at once, as ranks do."""
    threads = [threading.Thread(target=rank.heart.leave) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_nothing_is_said_where_all_leave(store: Callable[[], TCPStore]) -> None:
    """Also if one leaves long before the others."""
    ranks = started(store, 3, timeout_s=2)
    ranks[2].heart.leave()
    time.sleep(3)  # longer than the time-out
    leave(ranks[:2])
    assert [rank.said for rank in ranks] == [[], [], []]
    assert not any(rank.ended.is_set() for rank in ranks)


def test_a_silent_rank_is_named_and_all_others_end(store: Callable[[], TCPStore]) -> None:
    """Rank 0 says it once; those whose main thread does nothing are ended."""
    ranks = started(store, 3, timeout_s=2)
    ranks[1].heart.note((3, 0), "in a training step", 2)
    time.sleep(0.2)
    ranks[1].stop()
    for rank in (ranks[0], ranks[2]):
        assert rank.ended.wait(10)
        assert rank.status == 1
    (line,) = ranks[0].said + ranks[2].said
    assert line.startswith("rank 1 (process ")
    assert "at step 2 (in a training step)" in line


def test_a_failed_collective_makes_the_search_short(store: Callable[[], TCPStore]) -> None:
    """A dead rank is named long before the time-out, and the rank that waited hears it."""
    ranks = started(store, 3)
    time.sleep(0.2)
    ranks[1].stop()
    verdict = ranks[2].heart.fail("Connection closed by peer")
    assert verdict is not None
    assert verdict.author == 0
    assert "rank 1 (process" in verdict.text


def test_without_rank_0_each_says_what_it_knows(store: Callable[[], TCPStore]) -> None:
    """The one that judges is the one that is silent."""
    ranks = started(store, 2, timeout_s=0.5)
    time.sleep(0.2)
    ranks[0].stop()
    assert ranks[1].ended.wait(5)
    assert any("rank 0 (process" in line for line in ranks[1].said)


def test_the_first_error_counts_for_all(store: Callable[[], TCPStore]) -> None:
    """One line, one status, whoever comes second."""
    ranks = started(store, 3)
    first = ranks[1].heart.propose(3, "rank 1: shard 7 is broken")
    second = ranks[2].heart.propose(1, "rank 2: something else")
    assert second == first
    assert ranks[0].heart.fail("Connection closed by peer") == first
    leave(ranks)
    for rank in ranks:
        assert rank.ended.wait(5)  # nobody's main thread ended by itself
        assert rank.status == 3
    assert [rank.said for rank in ranks] == [[], ["rank 1: shard 7 is broken"], []]


def test_each_other_machine_says_it_too(store: Callable[[], TCPStore]) -> None:
    """Its log may be all that someone sees."""
    ranks = [Rank(store, rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.heart._mine = replace(rank.heart._mine, host="a" if rank is ranks[1] else "b")
        rank.heart._speaks_for_machine = rank is not ranks[2]
        rank.heart.start()
    ranks[1].heart.propose(3, "rank 1: shard 7 is broken")
    for rank in ranks:
        assert rank.ended.wait(5)
    assert [len(rank.said) for rank in ranks] == [1, 1, 0]


def test_a_child_that_ended_is_known_at_once(store: Callable[[], TCPStore]) -> None:
    """And the others that rank 0 has started are ended with it, whatever they do."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    ranks = [Rank(store, rank, 3) for rank in range(3)]
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"]) as ended:
        ranks[0].heart._children = [ended, sleeper]
        ranks[1].stop()
        for rank in ranks:
            rank.heart.start()
        assert ranks[0].ended.wait(10)
    assert ranks[0].said[0].startswith("rank 1 (process")
    assert "ended with exit status 5" in ranks[0].said[0]
    assert sleeper.wait(10) == -9


def test_an_old_verdict_does_not_count(store: Callable[[], TCPStore]) -> None:
    """The store of torchrun outlives an attempt."""
    store().set(heartbeat._VERDICT, "an old one")
    ranks = started(store, 2)
    time.sleep(0.3)
    leave(ranks)
    assert [rank.status for rank in ranks] == [None, None]
