"""Each rank tells the others that it is alive, and all end when one of them is not.

Two threads beside the main one. One writes this rank's beat into a store of key-value pairs (that
of torch's ranks), and reads others' and the verdict; it may wait for ever where the network is cut.
The other one judges by the clock, says the verdict, and ends the process if the main thread does
not. The first verdict that is published counts on all ranks.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from model.beats import PATIENCE, Beat, Heard, Verdict, judge

BEAT = 0.5
"""Seconds between two beats."""
LINGER = 3.0
"""Seconds that others have to hear why all end, and a main thread to notice it by itself."""
LAST_WORDS = 25.0
"""Seconds that a main thread has which did: loggers end, a checkpoint is on its way."""

_VERDICT = "shardstream/verdict"


class Heartbeat:
    """What a rank says, what it hears, and what follows."""

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        world: int,
        local_rank: int,
        timeout_s: float,
        complain: Callable[[str], None],
        children: Sequence["subprocess.Popen[bytes]"] = (),
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        """store: a connection that nobody else waits on, with the methods of torch's Store.

        timeout_s: silence that is too long. complain: writes a line for the user. children: the
        ranks that this one has started, in order. exit_process: whatever the main thread does.
        """
        self._store = store
        self._world = world
        self._speaks_for_machine = local_rank == 0
        self._timeout_s = timeout_s
        self._complain = complain
        self._children = children
        self._exit_process = exit_process
        self._mine = Beat(rank=rank, host=socket.gethostname(), process=os.getpid())
        self._since = self._failed_at = time.monotonic()
        self._count = 0
        self._heard: dict[int, tuple[Beat, float]] = {}  # and when it came
        self._proposed: Verdict | None = None
        self._verdict: Verdict | None = None
        self._settled = threading.Event()  # there is a verdict
        self._leaving = threading.Event()  # the main thread is on its way out
        self._gone = threading.Event()  # and the others were told
        self._hurry = threading.Event()  # there is news for the others
        self._unsaid = threading.Lock()
        if rank == 0:
            store.set(_VERDICT, "")  # one of an attempt before this one may be there
        store.set(_key(rank), self._mine.dump())

    def start(self) -> None:
        """Begin, when all ranks are there."""
        for target in (self._tell, self._watch):
            threading.Thread(target=target, daemon=True).start()

    def note(self, place: tuple[int, int], doing: str, step: int) -> None:
        """Where this rank is: see Beat."""
        self._since = time.monotonic()
        self._mine = replace(self._mine, place=place, doing=doing, step=step)

    def fail(self, why: str) -> Verdict | None:
        """A collective failed here: wait for the verdict. None if there is none in time."""
        self._failed_at = time.monotonic()
        self._mine = replace(self._mine, failed=why)
        self._settled.wait(4 * PATIENCE)  # a judgement takes less
        return self._verdict

    def propose(self, status: int, text: str) -> Verdict:
        """Publish a verdict, if there is none; returns the one that counts."""
        mine = Verdict(author=self._mine.rank, host=self._mine.host, status=status, text=text)
        self._proposed = self._proposed or mine
        self._hurry.set()
        if not self._settled.wait(4 * BEAT):  # nobody answers any more
            self._verdict = self._proposed
            self._settled.set()
        assert self._verdict is not None
        return self._verdict

    def leave(self) -> None:
        """Say goodbye. Rank 0, whose process may hold the store, lets the others do so first."""
        self._leaving.set()
        if self._verdict is not None:
            self._say(self._verdict)
        end = time.monotonic() + LINGER
        if self._mine.rank == 0:
            while self._others_are_there() and time.monotonic() < end:
                time.sleep(BEAT / 10)
            if self._verdict is not None:
                self._kill_children()
        self._mine = replace(self._mine, left=True)
        self._hurry.set()
        self._gone.wait(2 * BEAT)

    def exchange(self) -> None:
        """One beat: tell and hear. Raises what the store raises."""
        self._count += 1
        beat = self._beat()
        self._store.set(_key(beat.rank), beat.dump())
        ranks = (0,) if beat.rank else range(self._world)
        verdict, *beats = self._store.multi_get([_VERDICT, *map(_key, ranks)])
        if not verdict and self._proposed is not None:
            verdict = self._store.compare_set(_VERDICT, "", self._proposed.dump())
        now = time.monotonic()
        for other in map(Beat.load, beats):
            if other.rank not in self._heard or self._heard[other.rank][0].count != other.count:
                self._heard[other.rank] = (other, now)
        if verdict and not self._settled.is_set():
            self._verdict = Verdict.load(verdict)
            self._settled.set()
        if beat.left:
            self._gone.set()

    def judge(self) -> str | None:
        """What is wrong with the ranks that this one hears."""
        now = time.monotonic()
        heard = [Heard(beat=beat, silent_s=now - at) for beat, at in list(self._heard.values())]
        if self._mine.rank:
            heard.append(Heard(beat=self._beat()))
        return judge(
            heard, timeout_s=self._timeout_s, whole=self._mine.rank == 0, ended=self._ended()
        )

    def _tell(self) -> None:
        with suppress(Exception):  # without a store there is silence, which is judged
            while not self._gone.is_set():
                self.exchange()
                self._hurry.wait(BEAT)
                self._hurry.clear()

    def _watch(self) -> None:
        while not self._settled.wait(BEAT):
            if self._leaving.is_set():
                return
            text = self.judge()
            if text is not None:
                self.propose(1, text)
        assert self._verdict is not None
        self._say(self._verdict)
        if self._leaving.wait(LINGER):
            time.sleep(LAST_WORDS)
        self._kill_children()
        sys.stdout.flush()
        self._exit_process(self._verdict.status)

    def _say(self, verdict: Verdict) -> None:
        """Once: on the rank that found it, and on one of each other machine."""
        elsewhere = verdict.host != self._mine.host and self._speaks_for_machine
        if self._unsaid.acquire(blocking=False) and (
            elsewhere or verdict.author == self._mine.rank
        ):
            self._complain(verdict.text)

    def _beat(self) -> Beat:
        now = time.monotonic()
        failed_s = now - self._failed_at if self._mine.failed else 0.0
        return replace(self._mine, count=self._count, idle_s=now - self._since, failed_s=failed_s)

    def _others_are_there(self) -> bool:
        """Those that will never leave do not count."""
        since = time.monotonic() - PATIENCE
        heard = list(self._heard.items())
        return any(rank and not beat.left and at > since for rank, (beat, at) in heard)

    def _kill_children(self) -> None:
        """End the ranks that this one has started and that have not ended: one may be stopped."""
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(BEAT)
            child.send_signal(signal.SIGKILL)  # nothing to one that has ended

    def _ended(self) -> Mapping[int, int]:
        """Return codes of the ranks that this one has started."""
        codes = [child.poll() for child in self._children]
        first = self._mine.rank + 1
        return {rank: code for rank, code in enumerate(codes, first) if code is not None}


def _key(rank: int) -> str:
    return f"shardstream/rank{rank}"
