"""What the command lines share: types of arguments, and the progress bar."""

import argparse
import os
import re
from pathlib import Path

from tqdm import tqdm

from sharding.manifest import Shard
from sharding.store import local_path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(text: str) -> int:
    """'256MB' -> 256000000; KB, MB, GB are powers of ten, KiB, MiB, GiB powers of two."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = match[2] if match and match[2] != "B" else ""
    if not match or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 256MB or 64MiB")
    size = float(match[1]) * _UNITS[unit]
    if size >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any file can hold")
    return int(size)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def natural(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 0")
    return int(text)


def picture(text: str) -> Path:
    """The path of a picture that is made: a PNG."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a PNG; let it end with .png")
    return local_path(text)


def share(text: str) -> float:
    """'5%' or '0.05' -> 0.05; more than nothing, and all at most."""
    number, percent, rest = text.partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = 0
    if rest or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write for example 5%")
    return value


def count(number: int, noun: str) -> str:
    """PURE: '1 class', '2 classes'."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProgressBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """Progress on a terminal: images or tars a second, MB/s, time left; nothing elsewhere."""

    def __init__(self, title: str, total: int, unit: str = " images") -> None:
        super().__init__(total=total, desc=title, unit=unit, disable=None, dynamic_ncols=True)
        self._bytes = 0

    def advance(self, shard: Shard, by: int | None = None) -> None:
        """One more shard is done; `by` units, or as many as it has samples."""
        self._bytes += shard.bytes
        self.set_postfix_str(
            f"{self._bytes / 1e6 / max(self.format_dict['elapsed'], 1e-3):.0f} MB/s", refresh=False
        )
        self.update(shard.samples if by is None else by)
