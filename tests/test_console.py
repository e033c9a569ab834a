"""What command lines share: how sizes, numbers and shares are read."""

import argparse

import pytest

from sharding.console import byte_size, natural, picture, positive, share


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("700", 700),
        ("700B", 700),
        ("1.5KB", 1500),
        ("256MB", 256_000_000),
        ("64 MiB", 64 << 20),
        ("2gib", 2 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """KB, MB, GB are powers of ten, KiB, MiB, GiB powers of two."""
    assert byte_size(text) == size


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("100%", 1), ("0.25", 0.25), ("1", 1), ("0.1%", 0.001)]
)
def test_shares(text: str, value: float) -> None:
    """With a percent sign or without."""
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (byte_size, ["", "MB", "-1MB", "1 XB", "1e3", "nan", "9999999999GB"]),
        (share, ["", "0", "0%", "-5%", "101%", "1.5", "5%%", "5% ", "nan", "inf", "five"]),
        (positive, ["0", "-1", "1.0", "", "x", "²"]),
        (natural, ["-1", "1.0", "", "x"]),
        (picture, ["", "x", "x.jpg", "png", ".png"]),
    ],
)
def test_what_is_refused(kind: type, texts: list[str]) -> None:
    """What is no such number is named, and an example given where the form is not plain."""
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=r"is no|more than any"):
            kind(text)
