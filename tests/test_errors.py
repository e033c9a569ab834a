"""Errors: one line and an exit status for the user, a traceback for our own bugs."""

import pytest

from sharding.errors import BadImageError, DataError, UsageError, outcome, reports_errors


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("no such option"), 2, "no such option"),
        (DataError("byte 7 is wrong"), 3, "byte 7 is wrong"),
        (
            OSError(28, "No space left on device", "/d/x"),
            1,
            "/d/x'; free some space (see `df -h`), or use another disk",
        ),
        (OSError(24, "Too many open files"), 1, "(`ulimit -n 65536`), or use fewer workers"),
        (OSError(13, "Permission denied", "/d/x"), 1, "Permission denied: '/d/x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_one_line_and_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each error that a user meets becomes one line on stderr and its exit status."""

    @reports_errors
    def main() -> int:
        raise error

    assert main() == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f"{line}\n")
    assert err.count("\n") == 1
    assert ": error: " in err


@pytest.mark.parametrize("error", [ValueError, KeyError, AssertionError, SystemExit])
def test_bugs_keep_their_traceback(error: type[BaseException]) -> None:
    """An exception that no user is meant to see is not hidden."""

    @reports_errors
    def main() -> int:
        raise error

    with pytest.raises(error):
        main()


def test_outcomes_of_errors_that_are_told_elsewhere() -> None:
    """The same statuses for who reports by himself; a bug has none."""
    assert outcome(BadImageError("no image")) == (3, "no image")
    assert outcome(FileExistsError(17, "File exists")) == (2, "[Errno 17] File exists")
    assert outcome(ValueError("of ours")) is None
