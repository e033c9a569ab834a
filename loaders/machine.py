"""What this machine gives to a run: memory, processors, open files, folders, ports.

All of it is Linux's to tell; elsewhere, and where a file of /proc or /sys is missing, what it would
have said counts as no limit.
"""

import errno
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
SHM = Path("/dev/shm")  # noqa: S108  (it is looked at, nothing is written there)
UNLIMITED = 1 << 60
"""Bytes; what version 1 of control groups writes for 'no limit' is above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the processes of a run on this node share."""

    memory: int
    """Bytes that they can have at most: the machine's, or those of its control group."""
    free: int
    """Bytes of it that nobody has."""
    limited_by: str
    """What sets the limit, for people."""
    shm: int | None
    """Free bytes of /dev/shm; None where there is none."""
    cores: float
    """Processors; a control group may give a part of one."""
    open_files: int
    """Of one process."""
    open_files_most: int
    """What a user may raise that to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A folder that will be written to."""

    path: Path
    kind: str
    """Of its file system: ext4, nfs4, lustre; '' where nobody tells."""
    free: int
    """Bytes that this user can have."""
    problem: str
    """Why nothing can be written there; '' where it can."""


def this_machine(root: Path = ROOT) -> Machine:
    """Look around. root: where /proc and /sys are."""
    found = dict(_pairs(root / "proc/meminfo"))
    memory = found.get("MemTotal:", UNLIMITED >> 10) << 10
    free = found.get("MemAvailable:", UNLIMITED >> 10) << 10
    limited_by = "the machine's memory"
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        if limit is None or limit >= UNLIMITED:
            continue
        facts = dict(_pairs(folder / "memory.stat"))
        # What the page cache holds of files that nobody uses is given back where it is needed.
        used -= facts.get("total_inactive_file", facts.get("inactive_file", 0))
        free = min(free, max(limit - used, 0))
        if limit < memory:
            memory, limited_by = limit, f"the limit of the control group {folder}"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        memory=memory,
        free=free,
        limited_by=limited_by,
        shm=shutil.disk_usage(SHM).free if SHM.is_dir() else None,
        cores=_cores(root),
        open_files=UNLIMITED if soft == resource.RLIM_INFINITY else soft,
        open_files_most=UNLIMITED if hard == resource.RLIM_INFINITY else hard,
    )


def this_place(path: Path, root: Path = ROOT) -> Place:
    """Try a folder, or the nearest one above it that is there; nothing is left in it."""
    there = path.absolute()
    while not os.path.exists(there):  # also where one may not look
        there = there.parent
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=there) as stream:
            stream.write(bytes(4096))
            stream.flush()
    except OSError as error:
        problem = f"{there}: {error.strerror}"
    return Place(
        path=path,
        kind=_file_system(there.resolve(), root),
        free=shutil.disk_usage(there).free,
        problem=problem,
    )


def port_problem(host: str, port: int) -> str:
    """Why a rendezvous at this place would fail, as far as this machine can tell; '' if it can't.

    Raises nothing. A name that no server knows can take the resolver's time (some 10 s).
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return f"nobody knows the name {host}: {error.strerror}"
    with socket.socket(family, socket.SOCK_STREAM) as ours:
        try:
            ours.bind((address[0], 0))
        except OSError:
            return ""  # another machine's
    try:  # on all addresses, as torch's store does
        socket.create_server(("", port)).close()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        return f"port {port} of {host} (this machine) " + (
            "is taken" if taken else f"cannot be had: {error.strerror}"
        )
    return ""


def oom_kills(root: Path = ROOT) -> int:
    """How many processes the kernel has killed for memory since the machine started."""
    return dict(_pairs(root / "proc/vmstat")).get("oom_kill", 0)


def _cores(root: Path) -> float:
    """Processors that this process may use, and what a control group gives of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _groups(root, "cpu"):
        quota = _number(folder / "cpu.cfs_quota_us") or 0
        period = _number(folder / "cpu.cfs_period_us") or 0
        with suppress(OSError, ValueError):  # 'max 100000' has no quota
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        if quota > 0 and period > 0:
            cores = min(cores, quota / period)
    return cores


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of all above it, in both versions.

    In a container the path may be that of the host, and not be there: then its root is the group.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            mounts = [names, controller] if names else ["", "unified"]
            for mount in dict.fromkeys(root / "sys/fs/cgroup" / name for name in mounts):
                folder = mount / path.lstrip("/")
                yield from (f for f in (folder, *folder.parents) if f.is_relative_to(mount))


def _file_system(path: Path, root: Path) -> str:
    """The kind of the file system that a path without links is on."""
    best, kind = "", ""
    with suppress(OSError):
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            mount = fields[4].replace("\\040", " ")  # as the kernel writes a space
            if path.is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, fields[fields.index("-") + 1]
    return kind


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    """Names and numbers of a file that has one of each in a line."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, number = line.split()[:2]
            yield name, int(number)


def _number(*paths: Path) -> int | None:
    """What stands in the first of the files that is there; None for 'max'."""
    for path in paths:
        with suppress(OSError):
            text = path.read_text().strip()
            return None if text == "max" else int(text)
    return None
