"""What a machine gives: control groups of both versions, file systems, folders, ports."""

import resource
import socket
from pathlib import Path

import pytest

from loaders.machine import Machine, oom_kills, port_problem, this_machine, this_place

GB = 10**9
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1 kB\nMemAvailable:   12000000 kB\n"


def machine_of(root: Path, groups: str, **files: str) -> Machine:
    """A machine whose control groups are these; `__` in a file's name stands for a slash."""
    for name, text in {"proc__meminfo": MEMINFO, "proc__self__cgroup": groups, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return this_machine(root)


def test_without_control_groups_all_is_the_machines(tmp_path: Path) -> None:
    """Total and available memory as /proc tells them."""
    found = machine_of(tmp_path, "0::/\n")
    assert (found.memory, found.free) == (16_000_000 << 10, 12_000_000 << 10)
    assert found.limited_by == "the machine's memory"


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    """Version 2: the limit of a group above holds too; unused file cache is as good as free."""
    files = {
        "sys__fs__cgroup__job__memory.max": f"{8 * GB}\n",
        "sys__fs__cgroup__job__memory.current": f"{7 * GB}\n",
        "sys__fs__cgroup__job__memory.stat": f"anon {GB}\ninactive_file {5 * GB}\n",
        "sys__fs__cgroup__job__step__memory.max": "max\n",
        "sys__fs__cgroup__job__step__memory.current": "5\n",
        "sys__fs__cgroup__job__step__cpu.max": "50000 100000\n",
        "sys__fs__cgroup__job__cpu.max": "max 100000\n",
    }
    found = machine_of(tmp_path, "0::/job/step\n", **files)
    assert (found.memory, found.free, found.cores) == (8 * GB, 6 * GB, 0.5)
    assert found.limited_by.endswith("control group " + str(tmp_path / "sys/fs/cgroup/job"))


def test_version_1(tmp_path: Path) -> None:
    """Controllers have folders of their own, shared ones too; what is huge is no limit."""
    files = {
        "sys__fs__cgroup__memory__a__memory.limit_in_bytes": f"{4 * GB}\n",
        "sys__fs__cgroup__memory__a__memory.usage_in_bytes": f"{GB}\n",
        "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n",
        "sys__fs__cgroup__cpu,cpuacct__a__cpu.cfs_quota_us": "25000\n",
        "sys__fs__cgroup__cpu,cpuacct__a__cpu.cfs_period_us": "100000\n",
        "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us": "-1\n",
        "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n",
    }
    found = machine_of(tmp_path, "4:memory:/a\n3:cpu,cpuacct:/a\n1:name=systemd:/\n", **files)
    assert (found.memory, found.free, found.cores) == (4 * GB, 3 * GB, 0.25)


def test_in_a_container_the_path_is_the_hosts(tmp_path: Path) -> None:
    """A path that is not there: the group is the mount's own root."""
    files = {
        "sys__fs__cgroup__memory.max": f"{2 * GB}\n",
        "sys__fs__cgroup__memory.current": f"{3 * GB}\n",
    }
    found = machine_of(tmp_path, "0::/kubepods/pod1\n", **files)
    assert (found.memory, found.free) == (2 * GB, 0)


def test_this_machine_itself() -> None:
    """What runs here has memory, processors, and the limit of files that was set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        found = this_machine()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.open_files, found.open_files_most) == (soft - 1, hard)
    assert 0 < found.free <= found.memory < 1 << 50
    assert found.cores > 0
    assert oom_kills() >= 0


def test_kills_are_read(tmp_path: Path) -> None:
    """The kernel's counter; 0 where there is none."""
    assert oom_kills(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    assert oom_kills(tmp_path) == 3


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    """The nearest one above is tried, and nothing is left or made."""
    found = this_place(tmp_path / "a" / "b")
    assert (found.problem, found.path) == ("", tmp_path / "a" / "b")
    assert found.free > 0
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in the way, and a file system that takes nothing: the system's own reason."""
    (tmp_path / "file").touch()
    assert this_place(tmp_path / "file" / "run").problem.endswith("file: Not a directory")
    found = this_place(Path("/proc/self/run"))
    assert found.kind == "proc"
    assert found.problem.startswith("/proc/self: ")


def test_the_innermost_file_system_counts(tmp_path: Path) -> None:
    """Of all mounts that hold a path the deepest one, of two at one place the later one."""
    (tmp_path / "my disk").mkdir()
    mounts = [("/", "ext4"), (f"{tmp_path}", "nfs4"), (f"{tmp_path}/my disk", "overlay")]
    mounts += [(f"{tmp_path}/my disk", "lustre"), (f"{tmp_path}/my", "tmpfs")]
    escaped = [(path.replace(" ", "\\040"), kind) for path, kind in mounts]
    lines = [f"1 2 0:1 / {path} rw - {kind} none rw" for path, kind in escaped]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("\n".join(lines))
    assert this_place(tmp_path / "my disk/x", tmp_path).kind == "lustre"
    assert this_place(tmp_path / "x", tmp_path).kind == "nfs4"
    assert this_place(Path("/"), tmp_path).kind == "ext4"


def test_ports() -> None:
    """One that somebody listens on is taken; a free one, and another machine's, are not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert (
            port_problem("127.0.0.1", port) == f"port {port} of 127.0.0.1 (this machine) is taken"
        )
        assert port_problem("localhost", port).endswith("is taken")
        assert port_problem("192.0.2.1", port) == ""  # an address of nobody's
    assert port_problem("127.0.0.1", port) == ""


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver's reason."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    problem = port_problem("nowhere.invalid", 1)
    assert problem == "nobody knows the name nowhere.invalid: Name or service not known"
