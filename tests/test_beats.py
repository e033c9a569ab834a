"""model/beats.py: who is named for what."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from model.beats import PATIENCE, Beat, Heard, Verdict, judge

TIMEOUT = 60.0
CLOSED = "Connection closed by peer"


def beat(rank: int, *, step: int = 7, stage: int = 0, **facts: float | str | bool) -> Beat:
    """Of a rank in a training step."""
    place, doing = (step + 1, stage), "in a training step"
    made = Beat(
        rank=rank, host=f"node{rank}", process=40 + rank, step=step, place=place, doing=doing
    )
    return replace(made, **facts)  # type: ignore[arg-type]


def heard(*beats: Beat, **silent_s: float) -> list[Heard]:
    """Beats, and for how long nothing was heard of whom: r1=5."""
    return [Heard(beat=one, silent_s=silent_s.get(f"r{one.rank}", 0.4)) for one in beats]


LOST = 2 * PATIENCE + 0.1
GONE = 3 * PATIENCE + 0.1


@pytest.mark.parametrize(
    ("what", "ended", "words"),
    [
        # Nothing is wrong.
        (heard(beat(0), beat(1)), {}, None),
        (heard(beat(0), beat(1), r1=TIMEOUT - 1), {}, None),
        (heard(beat(0), beat(1, idle_s=TIMEOUT + 1)), {}, None),  # the others go on
        (heard(*(beat(r, idle_s=TIMEOUT + 1) for r in (0, 1))), {}, None),  # slow, all alike
        (heard(beat(0), beat(1, left=True), r1=TIMEOUT + 1), {1: 1}, None),  # it is done
        (heard(beat(0), beat(1)), {1: 0}, None),
        (heard(beat(0, failed=CLOSED, failed_s=1), beat(1), r1=1), {}, None),  # wait and see
        # Silent.
        (heard(beat(0), beat(1), r1=TIMEOUT + 1), {}, "rank 1 (process 41 on node1) has not been"),
        (heard(beat(0), beat(1), r1=TIMEOUT + 1), {}, "heard of for 61 s, at step 7 (in a train"),
        (heard(beat(0, failed=CLOSED, failed_s=4), beat(1), r1=4), {}, "rank 1 (process 41"),
        (heard(*map(beat, range(4)), r2=61, r3=62), {}, "neither have ranks 3"),
        # Silence counts before what those who are heard say.
        (heard(beat(0, failed=CLOSED, failed_s=LOST), beat(1), beat(2), r2=LOST), {}, "rank 2 ("),
        # Seen to end.
        (heard(beat(0), beat(1)), {1: -9}, "rank 1 (process 41 on node1) was ended by SIGKILL ("),
        (heard(beat(0), beat(1)), {1: -11}, "was ended by SIGSEGV at step 7"),
        (heard(beat(0), beat(1)), {1: 3}, "ended with exit status 3"),
        # Alive, and not where the others are.
        (
            heard(
                beat(0, stage=1, idle_s=61), beat(1, idle_s=61), beat(2, stage=1, idle_s=61)
            ),
            {},
            "rank 1 (process 41 on node1) is alive and does not go on: in a training step for 61 s",
        ),
        (
            heard(beat(0, failed="Timed out", failed_s=LOST), beat(1, idle_s=61)),
            {},
            "rank 1 (process 41 on node1) is alive and does not go on",
        ),
        # Nobody is to blame.
        (
            heard(*(beat(r, failed=CLOSED, failed_s=GONE) for r in (0, 1))),
            {},
            "lost its connection to another rank at step 7 (in a training step), and all ranks are",
        ),
    ],
)  # fmt: skip
def test_verdicts(what: list[Heard], ended: Mapping[int, int], words: str | None) -> None:
    """A dead, stopped or stuck rank is named; those that wait for it are not."""
    text = judge(what, timeout_s=TIMEOUT, whole=True, ended=ended)
    if words is None:
        assert text is None
    else:
        assert text is not None
        assert words in text


def test_a_rank_that_hears_only_rank_0_leaves_the_rest_to_it() -> None:
    """It judges silence, and where nobody does anything in time; not who is behind."""
    mine = beat(3, failed="Timed out", failed_s=LOST)
    assert judge(heard(beat(0), mine), timeout_s=TIMEOUT, whole=False) is None
    silent = judge(heard(beat(0), mine, r0=LOST), timeout_s=TIMEOUT, whole=False)
    assert silent is not None
    assert silent.startswith("rank 0 (")
    late = replace(mine, failed_s=GONE)
    assert judge(heard(beat(0), late), timeout_s=TIMEOUT, whole=False) is not None


def test_facts_survive_the_store() -> None:
    """Beats and verdicts are the same behind JSON."""
    one = beat(2, failed="a\nb", idle_s=1.5, left=True)
    assert Beat.load(one.dump().encode()) == one
    verdict = Verdict(author=1, host="a", status=3, text="ü")
    assert Verdict.load(verdict.dump()) == verdict
