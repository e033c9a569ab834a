"""mount_fsx.sh: what it would run, and what it runs on stub programs."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "mount_fsx.sh"
DNS = "fs-0123456789abcdef0.fsx.us-east-1.amazonaws.com"
_LOGS_ITSELF = """#!/bin/sh
echo "${0##*/} $*" >>"$LOG"
"""
_LFS = (
    _LOGS_ITSELF
    + """
[ "$1" != hsm_state ] || for path in "$@"; do
  case $path in
    hsm_state) ;;
    *.tar) echo "$path: (0x0000000d) released exists archived, archive_id:1" ;;
    *) echo "$path: (0x00000009) exists archived, archive_id:1" ;;
  esac
done
"""
)


class Machine:
    """A folder of stub programs that come first on PATH, and a list of what is mounted."""

    def __init__(self, root: Path) -> None:
        self.log = root / "log"
        self.mounts = root / "mounts"
        self.mounts.write_text("proc /proc proc rw 0 0\n")
        self.bin = root / "bin"
        self.bin.mkdir()

    def install(self, name: str, text: str = _LOGS_ITSELF) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(SCRIPT), *map(str, arguments)],
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "LOG": str(self.log),
                "MOUNT_FSX_MOUNTS": str(self.mounts),
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def calls(self) -> list[str]:
        """What was called, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    """A machine without the Lustre client."""
    return Machine(tmp_path)


@pytest.fixture
def machine(bare: Machine) -> Machine:
    """A machine with it."""
    bare.install("lfs", _LFS)
    for name in ("mount", "mount.lustre"):
        bare.install(name)
    return bare


def test_a_dry_run_prints_the_commands_and_runs_none(machine: Machine, tmp_path: Path) -> None:
    """Also words with spaces stand as one would type them; nothing is made or called."""
    folder = tmp_path / "f s x"
    done = machine.run("--dry_run", DNS, "abcdefgh", folder, "--shards", "/data/shards")
    assert (done.returncode, done.stderr) == (0, "")
    quoted = str(folder).replace(" ", "\\ ")
    assert [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")] == [
        f"mkdir -p -- {quoted}",
        f"mount -t lustre -o relatime,flock {DNS}@tcp:/abcdefgh {quoted}",
        f"lfs df -h {quoted}",
        "lfs getstripe -d /data/shards",
        "find /data/shards -type f -print0 | xargs -0 -r -n 100 lfs hsm_state | grep released",
    ]
    assert "lfs setstripe -c 1 /data/shards" in done.stdout
    assert "xargs -0 -r -n 100 -P 8 lfs hsm_restore" in done.stdout
    assert machine.calls() == []
    assert not folder.exists()


def test_it_mounts_and_counts_released_files(machine: Machine, tmp_path: Path) -> None:
    """The commands in their order; released files are counted, and how to restore them is said."""
    folder = tmp_path / "fsx"
    shards = folder / "a b"
    shards.mkdir(parents=True)
    for name in ("0.tar", "1.tar", "0.npy"):
        (shards / name).touch()
    done = machine.run(DNS, "abcdefgh", f"{folder}/", "--shards", shards)
    assert (done.returncode, done.stderr) == (0, "")
    *first, states = machine.calls()
    assert first == [
        f"mount -t lustre -o relatime,flock {DNS}@tcp:/abcdefgh {folder}",
        f"lfs df -h {folder}",
        f"lfs getstripe -d {shards}",
    ]
    assert states.startswith("lfs hsm_state ")
    assert f"2 released files below {shards}" in done.stdout
    assert "lfs hsm_restore" in done.stdout
    for name in ("0.tar", "1.tar"):
        (shards / name).unlink()
    done = machine.run(DNS, "abcdefgh", folder, "--shards", shards)
    assert "0 released files" in done.stdout
    assert "hsm_restore" not in done.stdout


def test_what_is_mounted_already_is_left(machine: Machine, tmp_path: Path) -> None:
    """The same file system: only looked at. Another: an error that names it."""
    folder = tmp_path / "f s"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    machine.mounts.write_text(f"10.0.0.1@tcp:/abcdefgh {escaped} lustre rw,flock 0 0\n")
    done = machine.run(DNS, "abcdefgh", folder)
    assert done.returncode == 0
    assert "is mounted already: 10.0.0.1@tcp:/abcdefgh" in done.stdout
    assert not any(call.startswith("mount ") for call in machine.calls())
    machine.mounts.write_text(f"server:/x {escaped} nfs rw 0 0\n")
    done = machine.run(DNS, "abcdefgh", folder)
    assert done.returncode == 2
    assert "something else is mounted" in done.stderr
    assert "server:/x nfs" in done.stderr


def test_a_command_that_fails_ends_it(machine: Machine, tmp_path: Path) -> None:
    """Nothing is done after a mount that failed, nor is a failed hsm_state taken for 0 files."""
    machine.install("mount", _LOGS_ITSELF + "exit 32\n")
    done = machine.run(DNS, "abcdefgh", tmp_path / "fsx")
    assert done.returncode == 1
    assert "mount failed with status 32" in done.stderr
    assert len(machine.calls()) == 1
    machine.install("mount")
    machine.install("lfs", _LOGS_ITSELF + '[ "$1" != hsm_state ]\n')
    (tmp_path / "fsx" / "0.tar").touch()
    done = machine.run(DNS, "abcdefgh", tmp_path / "fsx")
    assert done.returncode == 1
    assert "lfs hsm_state failed" in done.stderr


def test_without_the_client_it_says_how_to_install_it(bare: Machine, tmp_path: Path) -> None:
    """Status 2 and nothing run; a dry run goes on."""
    done = bare.run(DNS, "abcdefgh", tmp_path / "fsx")
    assert done.returncode == 2
    assert "lustre-client" in done.stderr
    assert not (tmp_path / "fsx").exists()
    done = bare.run("--dry_run", DNS, "abcdefgh", tmp_path / "fsx")
    assert done.returncode == 0
    assert "lustre-client" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([DNS, "abcdefgh", "/fsx", "--force"], "unknown argument --force"),
        ([DNS, "abcdefgh"], "got 2 of them"),
        ([DNS, "abcdefgh", "/fsx", "more"], "got 4 of them"),
        ([], "got 0 of them"),
        (["--shards"], "--shards needs a folder"),
        (["no dns", "abcdefgh", "/fsx"], "no dns is no DNS name"),
        ([DNS, "morethan8", "/fsx"], "morethan8 is no mount name"),
        ([DNS, "abcdefgh", "fsx"], "fsx is no absolute path"),
        ([DNS, "abcdefgh", "/"], "/ is no absolute path"),
        ([DNS, "abcdefgh", "/fsx", "--shards", "shards"], "shards is no absolute path"),
    ],
)
def test_wrong_use_is_refused(machine: Machine, arguments: list[str], text: str) -> None:
    """One line that names the argument, status 2, nothing run."""
    done = machine.run(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert machine.calls() == []
