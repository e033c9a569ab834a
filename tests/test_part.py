"""A segment on its way: who gives what, each byte once, and nothing half-written is read."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.part import PREFIX, Part

SIZES = [3, 1, 4, 1, 5, 9]
STARTS = [sum(SIZES[:row]) for row in range(len(SIZES))]
SAMPLES = [bytes([65 + row]) * size for row, size in enumerate(SIZES)]
WHOLE = b"".join(SAMPLES)
ROWS = range(len(SIZES))


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """The part of a file `whole` that is not there."""
    return Part(tmp_path / "whole")


def add(part: Part, row: int) -> None:
    """What a reader does."""
    part.add(row, STARTS[row], SAMPLES[row])


def read(part: Part, row: int) -> bytes | None:
    """What a reader asks for."""
    return part.read(row, STARTS[row], SIZES[row])


@given(
    st.lists(st.tuples(st.sets(st.sampled_from(ROWS)), st.integers(1, 3))),
)
def test_each_sample_comes_once(turns: list[tuple[set[int], int]]) -> None:
    """Readers add any samples between any two pieces; the rest is fetched, and nothing twice."""
    with tempfile.TemporaryDirectory() as folder:
        part = Part(Path(folder) / "whole")
        come: set[int] = set()
        with part.fetching(rows=len(ROWS), size=len(WHOLE)) as fetching:
            assert fetching is not None
            row = 0
            for added, most in [*turns, *[(set[int](), 1)] * len(ROWS)]:
                for one in added - come:
                    assert read(part, one) is None
                    add(part, one)
                come |= added
                run = fetching.missing(row)[:most]
                assert not come & set(run)
                if not run:
                    break
                data = b"".join(SAMPLES[one] for one in run)
                fetching.put(run, STARTS[run.start], data)
                come |= set(run)
                row = run.stop
                assert [one for one in ROWS if read(part, one)] == sorted(come)
                assert all(read(part, one) == SAMPLES[one] for one in come)
            assert come == set(ROWS)
            assert fetching.read(0, len(WHOLE)) == WHOLE
        assert (Path(folder) / "whole").read_bytes() == WHOLE
        assert os.listdir(folder) == ["whole"]


def test_only_one_fetches(part: Part, tmp_path: Path) -> None:
    """A second process gets nothing, neither during nor after; after a failure another one can."""

    def fetch_and_fail() -> None:
        with part.fetching(rows=6, size=len(WHOLE)) as first:
            assert first is not None
            with part.fetching(rows=6, size=len(WHOLE)) as second:
                assert second is None
            add(part, 2)
            raise OSError("the store is gone")

    with pytest.raises(OSError, match="gone"):
        fetch_and_fail()
    assert os.listdir(tmp_path) == []
    with part.fetching(rows=6, size=len(WHOLE)) as third:
        assert third is not None
        assert third.missing(0) == range(6)  # what the first one got is gone with it
    with part.fetching(rows=6, size=len(WHOLE)) as late:
        assert late is None
    assert os.listdir(tmp_path) == ["whole"]


def test_a_killed_process_leaves_nothing_that_counts(part: Part, tmp_path: Path) -> None:
    """Its samples are fetched anew, also where a reader still holds its files."""
    (tmp_path / f"{PREFIX}whole").write_bytes(b"x" * 100)
    (tmp_path / f"{PREFIX}whole.rows").write_bytes(b"\1" * 6)
    with open(tmp_path / f"{PREFIX}whole.rows", "r+b") as held:
        with part.fetching(rows=6, size=len(WHOLE)) as fetching:
            assert fetching is not None
            held.write(b"\1" * 6)
            held.flush()
            assert fetching.missing(0) == range(6)
            assert read(part, 0) is None
            fetching.put(range(6), 0, WHOLE)
        assert (tmp_path / "whole").read_bytes() == WHOLE


def test_what_is_not_on_its_way_takes_nothing(part: Part, tmp_path: Path) -> None:
    """A reader makes no file of its own, and harms none that is finished."""
    add(part, 0)
    assert os.listdir(tmp_path) == []
    assert read(part, 0) is None


def test_a_full_disk_is_no_matter_of_the_readers(
    part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written is not said to be there."""

    def full(descriptor: int, data: bytes, at: int) -> int:
        raise OSError(28, "No space left on device")

    with part.fetching(rows=6, size=len(WHOLE)) as fetching:
        assert fetching is not None
        with monkeypatch.context() as patch:
            patch.setattr("os.pwrite", full)
            add(part, 0)
        assert read(part, 0) is None
        assert fetching.missing(0) == range(6)
