"""Where a run starts: anew, from a named checkpoint, or from its own newest one.

The newest is looked for in the run's folder and, where the recipe has a checkpoint_url, there, too.
One that is elsewhere is fetched into the run's folder as fetched.ckpt, and removed at the end.
"""

import atexit
import difflib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from model.checkpoint import LAST
from model.hashes import BrokenCheckpointError, check, is_checkpoints, step_in
from model.newest import local_candidates, newest
from model.published import Published
from sharding.errors import DataError, UsageError
from sharding.store import LocalStore, atomic_file, local_path, open_store

FETCHED = "fetched.ckpt"
LOCK = ".lock"
HELD_S = 30.0
"""A run that was told to end takes some seconds."""
_LOOK_S = 0.2
INHERITED = "SHARDSTREAM_START"
"""Environment variable: process id of rank 0 and what it decided, for those it starts."""


class Start(NamedTuple):
    """Where a run starts."""

    path: Path | None
    """The checkpoint on this machine; None: anew."""
    where: str
    """Where it was found."""


ANEW = Start(None, "")


@contextmanager
def held(run: Path, *, warn: Callable[[str], None], wait_s: float = HELD_S) -> Iterator[None]:
    """Keep a run's folder for this process, and remove what a killed one left half-written.

    Two that train in one folder would tear each other's checkpoints. The lock is flock's: that of a
    process that is gone is free; on a file system without locks nothing is kept. Waits a while for
    a process that may be ending. Raises UsageError, which names it.
    """
    new = not run.exists()
    until, warned = time.monotonic() + wait_s, False
    while (descriptor := _locked(run / LOCK)) is None:
        holder = "another process"
        with suppress(OSError):  # it has just ended, and removed its note
            holder = (run / LOCK).read_text() or holder
        if time.monotonic() >= until:
            raise UsageError(f"{holder} trains in {run}; end it, or choose another folder (--run)")
        if not warned:
            warn(f"{holder} trains in {run}; waiting up to {wait_s:g} s for its end")
            warned = True
        time.sleep(_LOOK_S)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        LocalStore(run / "checkpoints").sweep(is_checkpoints)
        yield
    finally:
        with suppress(OSError):  # what cannot be removed is in nobody's way
            if new and os.listdir(run) == [LOCK]:  # a mistake, and nothing came of it
                (run / LOCK).unlink()
                run.rmdir()
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """The file's descriptor, locked where the file system can; None while another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):  # not found: its holder has just removed it
        pass
    except OSError:
        return descriptor
    os.close(descriptor)
    return None


def open_published(url: str) -> Published:
    """The checkpoints at a path, a file:// or an s3:// URL. Raises UsageError."""
    return Published(open_store(url), damage=(DataError,))


def start_of(
    resume: str | None,
    run: Path | None,
    published: Published | None,
    *,
    rank: int,
    warn: Callable[[str], None],
    environ: MutableMapping[str, str] = os.environ,
    parent: int | None = None,
) -> Start:
    """The checkpoint to start from, or none.

    resume: None, auto, a path or an s3:// URL. published: where the run's checkpoints are beside
    its folder; None: nowhere. Only rank 0 looks elsewhere than in the folder, and insists that
    there is something: other ranks may have to do with what it finds. parent: process id of this
    process's; None: ask the system. Raises UsageError where a checkpoint is missing, or in the
    way, DataError where it is broken and there is no other.
    """
    if rank:
        decider, _, decided = environ.get(INHERITED, "").partition(" ")
        if decider == str(os.getppid() if parent is None else parent):
            return Start(Path(decided), decided) if decided else ANEW
        if resume is None:
            return ANEW
        if resume != "auto":
            return Start(placeholder(run) if "://" in resume else local_path(resume), resume)
        return _newest(run, None, warn)
    if run is not None:
        (run / FETCHED).unlink(missing_ok=True)  # of a run that was killed
    start = _first(resume, run, published, warn)
    environ[INHERITED] = f"{os.getpid()} {start.path or ''}"
    return start


def forget(environ: MutableMapping[str, str] = os.environ) -> None:
    """The ranks below this one were started: what is started later decides for itself."""
    environ.pop(INHERITED, None)


def placeholder(run: Path | None) -> Path:
    """Where a checkpoint that was fetched stands; on other nodes, it stands for one."""
    if run is not None:
        return run / FETCHED
    return Path(tempfile.gettempdir()) / f"shardstream-{os.getpid()}-{FETCHED}"


@contextmanager
def local_checkpoint(place: str) -> Iterator[Path]:
    """A checkpoint's path, or the file that it was fetched to and checked, for the block's time.

    Raises UsageError if there is none, DataError if what was fetched is broken.
    """
    if "://" not in place:
        yield _file(place, near=())
        return
    with tempfile.TemporaryDirectory(prefix="shardstream-") as folder:
        yield _fetch(place, Path(folder) / FETCHED)


def _first(
    resume: str | None, run: Path | None, published: Published | None, warn: Callable[[str], None]
) -> Start:
    if resume == "auto":
        return _newest(run, published, warn)
    if resume is None:
        _refuse_other(run, published)
        return ANEW
    if "://" not in resume:
        return Start(_existing(resume, near=("auto",)), resume)
    path = _fetch(resume, placeholder(run))
    atexit.register(path.unlink, missing_ok=True)
    return Start(path, resume)


def _newest(run: Path | None, published: Published | None, warn: Callable[[str], None]) -> Start:
    """The newest whole checkpoint of a run; broken ones that are newer are named."""
    if run is None:
        return ANEW
    candidates = local_candidates(run / "checkpoints")
    if published is not None:
        atexit.register((run / FETCHED).unlink, missing_ok=True)
        candidates += published.candidates(run / FETCHED, atomic_file)
    taken, broken = newest(candidates)
    if taken is None and broken:
        raise DataError(f"{broken[0]}; there is no whole checkpoint, start a new run")
    if taken is None:
        return ANEW
    for line in broken:
        warn(f"{line}; going on from {taken.where}")
    return Start(taken.path, taken.where)


def _refuse_other(run: Path | None, published: Published | None) -> None:
    """Raise UsageError where a new run would overwrite another one's checkpoints."""
    advice = "holds a run already; go on with it (--resume auto), choose another"
    if run is not None and (run / "checkpoints" / LAST).exists():
        raise UsageError(f"{run} {advice} folder (--run FOLDER) or remove it")
    if published is not None and published.names():
        raise UsageError(f"{published.url} {advice} place (--checkpoint_url URL) or remove it")


def _file(place: str, near: Sequence[str]) -> Path:
    """near: what else could have been meant, beside the checkpoints that there are."""
    path = local_path(place)
    if path.is_dir():
        found = next(
            (last for last in (path / LAST, path / "checkpoints" / LAST) if last.exists()), ""
        )
        raise UsageError(
            f"{place} is a folder" + (f"; did you mean {found}?" if found else " without a " + LAST)
        )
    if not path.is_file():
        there = [str(path.with_name(other.name)) for other in path.parent.glob("*.ckpt")]
        meant = difflib.get_close_matches(str(path), there, 1)
        meant += difflib.get_close_matches(place.lower(), near, 1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        raise UsageError(f"there is no checkpoint {place}{hint}")
    return path


def _existing(place: str, near: Sequence[str]) -> Path:
    path = _file(place, near)
    try:
        check(path)
        step = step_in(path)
    except BrokenCheckpointError as error:
        raise DataError(str(error)) from error
    if step < 0:
        raise DataError(f"{path} is no checkpoint of a run, but of weights alone")
    return path


def _fetch(url: str, path: Path) -> Path:
    folder, _, name = url.rpartition("/")
    try:
        open_published(folder).fetch(name, path, atomic_file)
    except FileNotFoundError as error:
        raise UsageError(f"there is no checkpoint {url}") from error
    except BrokenCheckpointError as error:
        raise DataError(str(error)) from error
    return path
