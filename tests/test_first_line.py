"""model/first_line.py: an error of any length in a line."""

import pytest

from model.first_line import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("plain"), "plain"),
        (RuntimeError("\nsize mismatch:\n  for conv1"), "size mismatch:"),
        (KeyError(), "KeyError()"),
        (OSError(" \n"), "OSError(' \\n')"),
    ],
    ids=repr,
)
def test_lines(error: Exception, line: str) -> None:
    """Leading blank lines do not count; no text is told by the kind of error."""
    assert first_line(error) == line
