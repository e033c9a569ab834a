"""What the tests of packers share: the command again, and what became of the files."""

import os
from pathlib import Path

from tests.make_images import files_below, run_shard

OPTIONS = ("--max_samples", "1", "--workers")


def finish(source: Path, folder: Path, expected: dict[str, bytes]) -> None:
    """The same command again ends well, with the bytes of an undisturbed run and nothing else."""
    again = run_shard("pack", source, folder.parent, *OPTIONS, "2")
    assert (again.returncode, again.stderr) == (0, "")
    assert files_below(folder) == expected


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file: another one was written anew."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def put(path: Path, at: int) -> None:
    """Put other bytes into a file, `at` from its end if that is negative."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(b"\xaa")
