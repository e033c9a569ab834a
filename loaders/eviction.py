"""Keeps a node's cache within its limit when runs before this one have left their files in it.

A fetcher knows what its own rank still needs; whose the other files are it cannot know: of another
rank, of another training beside this one, or of one that has ended and had another seed, other
lanes or other data. So each fetcher claims its files by their time of modification, again and
again, and what nobody has claimed for a while goes, oldest first, when room is needed.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

CLAIM_S = 60.0
"""After which a fetcher claims anew."""
ABANDONED_S = 10 * CLAIM_S
"""A file that nobody has claimed for so long is nobody's."""

_DATA_SET = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(r"(\.part-)?[0-9a-f]{32}(\.npy|-\d+-\d+(\.rows)?)|\.tmp-[0-9a-f]{32}\.npy-\w+")


class Cached(NamedTuple):
    """A file of a cache."""

    claimed: float
    """When, in seconds as time.time() has them."""
    size: int
    """In bytes."""
    path: Path


def scan(folder: Path) -> list[Cached]:
    """All files of the cache in this folder, of whatever data set, and no others."""
    found = []
    with suppress(OSError):  # no cache yet, or another user's
        for data_set in folder.iterdir():
            if _DATA_SET.fullmatch(data_set.name):
                found += _scan_data_set(data_set)
    return found


def _scan_data_set(folder: Path) -> list[Cached]:
    found = []
    # Gone meanwhile, a file, or another user's: then there is nothing here that we could delete.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name):
                with suppress(OSError):  # gone meanwhile
                    facts = entry.stat(follow_symlinks=False)
                    found.append(Cached(facts.st_mtime, facts.st_size, Path(entry.path)))
    return found


def claim(paths: Iterable[Path]) -> None:
    """Say that these files are wanted; those that are gone are passed over."""
    for path in paths:
        with suppress(OSError):  # gone, or another user's, whose process claims it
            os.utime(path)


def abandoned(found: Iterable[Cached], *, excess: int, now: float) -> list[Cached]:
    """PURE: the oldest files that nobody claims, as many as make `excess` bytes."""
    chosen = []
    for cached in sorted(found):
        if excess <= 0 or cached.claimed > now - ABANDONED_S:
            break
        chosen.append(cached)
        excess -= cached.size
    return chosen


def make_room(folder: Path, *, coming: int, limit: int) -> int:
    """Delete what nobody claims until `coming` bytes more keep to the limit; bytes deleted."""
    found = scan(folder)
    excess = sum(cached.size for cached in found) + coming - limit
    gone = abandoned(found, excess=excess, now=time.time())
    return sum(cached.size for cached in gone if delete(cached.path))


def delete(path: Path) -> bool:
    """Delete a file of a cache; whether it is gone.

    It stays while somebody reads or fetches it, and where it is another user's.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
