"""How many requests of a process a service is asked at the same time: fewer while it says so."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 64


class ConcurrencyLimiter:
    """Lets so many through at a time, after the manner of TCP's congestion control (AIMD).

    Each `slower` halves the number, each `faster` adds a part, so that as many as now have to do
    well before it is one more. An answer to what was asked before the number was halved does not
    halve it again.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._allowed = float(most)
        self._inside = 0
        self._turn = 0
        self._changed = threading.Condition()

    @property
    def allowed(self) -> int:
        """How many may be inside at a time: 1 to `most`."""
        return int(self._allowed)

    @contextmanager
    def enter(self) -> Iterator[int]:
        """Wait for a place, and keep it. Gives a number to be handed to `slower`."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside < self.allowed)
            self._inside += 1
            turn = self._turn
        try:
            yield turn
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify()

    def slower(self, turn: int) -> None:
        """The service was asked too much by one who entered at this turn."""
        with self._changed:
            if turn == self._turn:
                self._turn += 1
                self._allowed = max(1.0, self._allowed / 2)

    def faster(self) -> None:
        """The service did what it was asked."""
        with self._changed:
            before = self.allowed
            self._allowed = min(float(self._most), self._allowed + 1 / self._allowed)
            self._changed.notify(self.allowed - before)
