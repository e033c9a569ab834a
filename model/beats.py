"""Which rank is dead, stuck or cut off: judged from what each rank says of itself.

    rank 0   hears every rank, and judges
    rank r   hears rank 0 alone: the two ends of a broken connection see each other's silence

A rank that is alive says so every half second, also while its main thread waits in a collective. So
the one that is stopped or gone is told from those that wait for it.
"""

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

PATIENCE = 3.0
"""Seconds of silence that tell a dead rank, once a collective has failed on another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    process: int
    count: int = 0
    """Of its beats: a new one was sent by a process that is alive."""
    step: int = 0
    place: tuple[int, int] = (0, 0)
    """Training batches begun, and a stage behind that: the same on all ranks in the same place."""
    doing: str = "starting"
    idle_s: float = 0.0
    """Seconds since it came to this place."""
    failed: str = ""
    """Why a collective failed on it."""
    failed_s: float = 0.0
    """Seconds since then."""
    left: bool = False
    """It is done with all collectives."""

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str | bytes) -> "Beat":
        """From JSON."""
        values = json.loads(text)
        return cls(**{**values, "place": tuple(values["place"])})

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """A rank's last beat, and how long there was no newer one."""

    beat: Beat
    silent_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Why all ranks end: the first one that is published counts, on all of them."""

    author: int
    host: str
    status: int
    """Exit status of all ranks."""
    text: str

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str | bytes) -> "Verdict":
        """From JSON."""
        return cls(**json.loads(text))


def judge(
    heard: Sequence[Heard],
    *,
    timeout_s: float,
    whole: bool,
    ended: Mapping[int, int] | None = None,
) -> str | None:
    """PURE: what is to be said of ranks that hold up all others; None: nothing is wrong.

    heard: this rank's own beat too. whole: whether these are all ranks. ended: the return codes
    (negative: signals) of ranks whose process this one has started and seen end.

    Silence counts from timeout_s on; where a collective has failed already, from PATIENCE on.
    """
    present = [one for one in heard if not one.beat.left]
    for one in present:
        if code := (ended or {}).get(one.beat.rank, 0):
            return _dead(one.beat, code)
    troubled = [one.beat for one in present if one.beat.failed]
    trouble_s = max((beat.failed_s for beat in troubled), default=0.0)
    limit_s = min(timeout_s, PATIENCE) if troubled else timeout_s
    silent = [one for one in present if one.silent_s > limit_s]
    if silent:
        return _silent(silent)
    if whole:
        last = min((one.beat.place for one in present), default=(0, 0))
        behind = [one.beat for one in present if one.beat.place == last]
        if len(behind) < len(present) and all(one.beat.idle_s > timeout_s for one in present):
            return _stuck(behind)
        waited_for = [one.beat for one in present if not one.beat.failed]
        if waited_for and trouble_s > 1.5 * PATIENCE:
            return _stuck(waited_for)
    if trouble_s > 3 * PATIENCE:
        beat = troubled[0]
        return (
            f"rank {beat.rank} lost its connection to another rank {_in(beat)}, and all ranks are "
            f"alive ({beat.failed}); look at the network between their machines, then {_AGAIN}"
        )
    return None


_AGAIN = "start the same command again with --resume auto"


def _dead(beat: Beat, code: int) -> str:
    if code > 0:
        return f"{beat} ended with exit status {code} {_in(beat)}; its own message says why"
    name = signal.Signals(-code).name
    memory = " (out of memory? dmesg tells)" if -code == signal.SIGKILL else ""
    return f"{beat} was ended by {name}{memory} {_in(beat)}; {_AGAIN}"


def _silent(silent: Sequence[Heard]) -> str:
    one = min(silent, key=lambda each: (each.beat.place, each.beat.rank))
    others = sorted({each.beat.rank for each in silent} - {one.beat.rank})
    more = f"; neither have ranks {', '.join(map(str, others))}" if others else ""
    return (
        f"{one.beat} has not been heard of for {one.silent_s:.0f} s, {_in(one.beat)}{more}: it was "
        "killed or stopped, or its machine or the network is down. Look there for the process (ps) "
        f"and for memory that ran out (dmesg), then {_AGAIN}"
    )


def _stuck(behind: Sequence[Beat]) -> str:
    names = " and ".join(map(str, behind))
    one = min(behind, key=lambda beat: beat.place)
    return (
        f"{names} is alive and does not go on: {one.doing} for {one.idle_s:.0f} s, behind step "
        f"{one.step}, while all others wait for it. Look at its storage, its loader workers and "
        f"its device, then {_AGAIN}"
    )


def _in(beat: Beat) -> str:
    return f"at step {beat.step} ({beat.doing})"
