"""Who packs into a store, and by which plan: a lock on a folder, a mark in an object store.

One packer holds a folder alone; packers of parts share it, each part held by one. The locks are
flock's, so that of a dead process is gone with it. The file `.packing` stays until there is a
manifest: shards in a folder with it are an unfinished data set of the plan that it names.
"""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sharding.errors import UsageError
from sharding.manifest import MANIFEST_NAME
from sharding.store import Store

LOCK_NAME = ".packing"
_NOTE_BYTES = 512


@dataclass(frozen=True, slots=True)
class Part:
    """One of several packers of the same plan: it makes shards i, i + n, i + 2n, ..."""

    i: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.i < self.n:
            raise ValueError(f"part {self.i}/{self.n}: parts of {self.n} are 0 to {self.n - 1}")


@contextmanager
def locked(
    root: Path, *, plan: str, part: Part | None, other_plan: Callable[[], None]
) -> Iterator[None]:
    """Hold the folder for packing by this plan; `other_plan` is to remove what another one left.

    Raises UsageError, naming host and process of the holder, where a packer is at work, for a
    folder with foreign shards, and for a part where another plan is unfinished.
    """
    root.mkdir(parents=True, exist_ok=True)
    mark = root / LOCK_NAME
    ours = mark.exists() or (root / MANIFEST_NAME).exists()
    if not ours and any(name.suffix in {".tar", ".npy"} for name in root.iterdir()):
        raise _foreign(root)
    with _held(mark, fcntl.LOCK_SH if part else fcntl.LOCK_EX, root) as lock:
        if not mark.exists():  # the other one finished between our open and our lock
            raise UsageError(f"another packer has just finished {root}")
        if part:
            with _held(root / f"{LOCK_NAME}-{part.i}", fcntl.LOCK_EX, root) as mine:
                _write(mine)
                _join(lock, plan, root)
                yield
            return
        if _plan_of(lock) != plan and not (root / MANIFEST_NAME).exists():
            other_plan()
        _write(lock, plan=plan)
        try:
            yield
        finally:
            if (root / MANIFEST_NAME).exists():
                for leftover in root.glob(f"{LOCK_NAME}*"):
                    leftover.unlink()


@contextmanager
def marked(
    store: Store, *, plan: str, part: Part | None, other_plan: Callable[[], None]
) -> Iterator[None]:
    """The same for an object store, which has no locks: nothing keeps a second packer out.

    Two of the same plan make the same objects. Two of different plans would overwrite each other's,
    which the manifest's hashes bring to light.
    """
    names = store.sizes()
    if MANIFEST_NAME in names:  # nothing will be written
        yield
        return
    try:
        found = _note(store.read(LOCK_NAME)).get("plan")
    except FileNotFoundError:
        found = None
        if any(name.endswith((".tar", ".npy")) for name in names):
            raise _foreign(store.url) from None
    if found != plan:
        if found is not None and part is not None:
            raise _other(store.url)
        other_plan()
        with store.create(LOCK_NAME) as stream:
            stream.write(json.dumps({"plan": plan}).encode())
    yield
    if part is None:
        store.delete(LOCK_NAME)


@contextmanager
def _held(path: Path, kind: int, root: Path) -> Iterator[int]:
    """The descriptor of a file that is locked for the block."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another packer is at work on {root}: {_holders(root)}") from error
        except OSError as error:
            raise UsageError(
                f"{root} cannot be locked ({error.strerror}); if it is on Lustre, mount it with "
                "the option flock"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _join(mark: int, plan: str, root: Path) -> None:
    """Take part in the plan of the folder, or give it one if it has none."""
    with open(root / f"{LOCK_NAME}-join", "wb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # one part at a time, for the lines below
        found = _plan_of(mark)
        if found is None:
            _write(mark, plan=plan, holder=False)
        elif found != plan:
            raise _other(root)


def _foreign(place: object) -> UsageError:
    return UsageError(
        f"{place} holds .tar or .npy files that were not packed here; choose an empty folder"
    )


def _other(place: object) -> UsageError:
    return UsageError(
        f"{place} holds an unfinished data set of other images or options; give this part those of "
        "the others, or remove the folder to start over"
    )


def _holders(root: Path) -> str:
    """Host and process of those that hold a lock here, as they noted them."""
    found = []
    for path in sorted(root.glob(f"{LOCK_NAME}*")):
        with suppress(OSError), open(path, "rb") as lock:
            note = _note(lock.read())
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # free: of one that is gone
            except BlockingIOError:
                if "pid" in note:
                    found.append(f"host {note['host']}, process {note['pid']}")
    return "; ".join(found) or "just started"


def _plan_of(mark: int) -> object:
    return _note(os.pread(mark, _NOTE_BYTES, 0)).get("plan")


def _write(lock: int, *, plan: str = "", holder: bool = True) -> None:
    note: dict[str, object] = {"plan": plan}
    if holder:
        note |= {"host": socket.gethostname(), "pid": os.getpid()}
    # In one write of a fixed length: a kill leaves the old note or the new one.
    os.pwrite(lock, json.dumps(note).encode().ljust(_NOTE_BYTES), 0)


def _note(text: bytes) -> dict[str, object]:
    try:
        note = json.loads(text)
    except ValueError:  # empty: its packer has just started
        return {}
    return note if isinstance(note, dict) else {}
