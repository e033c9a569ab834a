"""A packer that is killed, stopped or short of space goes on, and ends with the same bytes."""

import errno
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from sharding.lock import LOCK_NAME
from sharding.manifest import MANIFEST_NAME, Packing
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore
from tests.make_images import (
    ENVIRONMENT,
    SHARD_PY,
    files_below,
    image,
    image_folder,
    pack_folder,
    run_shard,
    write_files,
)
from tests.packers import OPTIONS, finish, identities, put

Packer = subprocess.Popen[str]


STOPS = """
import os, signal, sys
import shard

def stop(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(moment):
        os.kill(0, signal.SIGSTOP)

moment = sys.argv.pop()
sys.argv[0] = "shard.py"
sys.addaudithook(stop)
sys.exit(shard.main())
"""


@contextmanager
def packer(source: Path, folder: Path, moment: str) -> Iterator[tuple[Packer, list[int]]]:
    """A packer into `folder`, leader of a process group, and the process ids of its two workers.

    All stand still just before the file `moment` gets its name.
    """
    line = [sys.executable, "-c", STOPS, "pack", str(source), str(folder.parent), *OPTIONS, "2"]
    with subprocess.Popen(
        [*line, moment],
        cwd=Path(SHARD_PY[1]).parent,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            yield process, [int(number) for number in children.split()]
        finally:
            with suppress(ProcessLookupError):  # all ended, as they should
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("kill", [os.killpg, os.kill], ids=["group", "parent"])
@pytest.mark.parametrize(
    "moment", ["train-000000.tar", "train-000016.tar", "train-000016.npy", MANIFEST_NAME]
)
def test_sigkill(
    images_48: Path,
    packed_48: dict[str, bytes],
    tmp_path: Path,
    moment: str,
    kill: Callable[[int, int], None],
) -> None:
    """A packer killed with its workers, or alone, leaves none, and the same command finishes."""
    folder = tmp_path / "train"
    with packer(images_48, folder, moment) as (process, workers):
        descriptors = [os.pidfd_open(worker) for worker in workers]
        kill(process.pid, signal.SIGKILL)
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], 10)[0] == [descriptor]  # it has ended
            os.close(descriptor)
    assert len(workers) == (0 if moment == MANIFEST_NAME else 2)
    assert moment not in os.listdir(folder)
    assert any(name.startswith(".tmp-") for name in os.listdir(folder))
    finish(images_48, folder, packed_48)


OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "tempfile.mkstemp"}


def pack_until(operation: int, source: Path, destination: Path) -> int:
    """Pack in a fork that is killed before its n-th file operation; its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a fork beside threads
        child = os.fork()
    if not child:
        operations = itertools.count(1)

        def kill(event: str, _: object) -> None:
            if event in OPERATIONS and next(operations) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(kill)
            pack_folder(source, destination, max_samples=2)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again_and_again", [False, True])
def test_sigkill_before_each_file_operation(tmp_path: Path, again_and_again: bool) -> None:
    """Killed before any of its file operations, once or in each attempt, the bytes are the same."""
    source = image_folder(tmp_path / "in", {"a": 3, "b": 2})
    pack_folder(source, tmp_path / "expected", max_samples=2)
    expected = files_below(tmp_path / "expected")
    for operation in itertools.count(1):
        destination = tmp_path / ("out" if again_and_again else str(operation))
        status = pack_until(operation, source, destination)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if not again_and_again:
            pack_folder(source, destination, max_samples=2)
            assert files_below(destination) == expected
    assert operation > 20
    assert files_below(destination) == expected


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, 1, "a worker process was killed")],
)
def test_stopped(
    images_48: Path,
    packed_48: dict[str, bytes],
    tmp_path: Path,
    *,
    number: int,
    status: int,
    message: str,
) -> None:
    """A packer that gets Ctrl-C or loses its workers says so; the same command goes on."""
    with packer(images_48, tmp_path / "train", "train-000016.tar") as (process, workers):
        for victim in workers if number == signal.SIGKILL else [-process.pid]:
            os.kill(victim, number)
        os.killpg(process.pid, signal.SIGCONT)
        errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors.count("\n")) == (status, 1)
    assert errors.startswith(f"shard.py: error: {message}")
    finish(images_48, tmp_path / "train", packed_48)


def test_second_packer(images_48: Path, packed_48: dict[str, bytes], tmp_path: Path) -> None:
    """A second packer fails at once and names the first; when that is killed, its lock is free."""
    write_files(tmp_path / "train", {LOCK_NAME: b'{"host": "gone", "pid": 1}'})
    with packer(images_48, tmp_path / "train", "train-000000.tar") as (first, _):
        second = run_shard("pack", images_48, tmp_path, *OPTIONS, "2")
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"another packer is at work on {tmp_path}/train: host " in second.stderr
    assert second.stderr.endswith(f"process {first.pid}\n")
    finish(images_48, tmp_path / "train", packed_48)


def swap(folder: Path, *extensions: str) -> None:
    """Exchange these files of shards 0 and 1."""
    for extension in extensions:
        one, other = (folder / f"train-00000{i}.{extension}" for i in (0, 1))
        one.rename(folder / "between")
        other.rename(one)
        (folder / "between").rename(other)


def unfinish(source: Path, folder: Path, **options: int) -> None:
    """Make a finished data set look as if its packer was killed before the manifest."""
    job = Job(
        listing=scan(source), store=LocalStore(folder), split="train", packing=Packing(**options)
    )
    (folder / MANIFEST_NAME).unlink()
    note = {"plan": job.plan, "host": "gone", "pid": 1}
    write_files(folder, {LOCK_NAME: json.dumps(note).encode()})


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: put(folder / "train-000000.tar", 700),  # an image
        lambda folder: put(folder / "train-000000.tar", 0),  # a header
        lambda folder: put(folder / "train-000000.tar", -1),  # the end
        lambda folder: put(folder / "train-000001.npy", -1),
        lambda folder: os.truncate(folder / "train-000000.tar", 512),
        lambda folder: os.truncate(folder / "train-000000.tar", 0),
        lambda folder: os.truncate(folder / "train-000000.tar", 1 << 20),  # longer
        lambda folder: os.truncate(folder / "train-000001.npy", 100),
        lambda folder: os.unlink(folder / "train-000001.tar"),
        lambda folder: os.unlink(folder / "train-000001.npy"),
        lambda folder: swap(folder, "npy"),
        lambda folder: swap(folder, "npy", "tar"),
        lambda folder: write_files(folder, {".tmp-x": b"half a shard"}),
    ],
    ids=itertools.count(),
)
def test_damage_before_a_restart(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """What a crash damaged is made again, what it left is removed, what is whole is kept."""
    source = image_folder(tmp_path / "in", {"a": 3, "b": 3})
    folder = tmp_path / "out"
    pack_folder(source, folder, max_samples=2)
    expected, before = files_below(folder), identities(folder)
    unfinish(source, folder, max_samples=2)
    damage(folder)
    pack_folder(source, folder, max_samples=2)
    assert files_below(folder) == expected
    for name in ("train-000002.tar", "train-000002.npy"):
        assert identities(folder)[name] == before[name]


def test_another_plan_starts_over(tmp_path: Path) -> None:
    """Shards that other options left half done are not taken for ours; none of them stays."""
    source = image_folder(tmp_path / "in", {"a": 3, "b": 3})
    pack_folder(source, tmp_path / "expected", max_samples=2)
    folder = tmp_path / "out"
    pack_folder(source, folder, max_samples=1)
    before = identities(folder)
    unfinish(source, folder, max_samples=1)
    pack_folder(source, folder, max_samples=2)
    assert files_below(folder) == files_below(tmp_path / "expected")
    assert not set(before.values()) & set(identities(folder).values())


def test_disk_without_room(tmp_path: Path) -> None:
    """A shard that cannot be written leaves no half file; earlier shards stay, and it goes on."""
    big = {"a/big.png": image(9, "PNG", size=(300, 300))}
    source = image_folder(write_files(tmp_path / "in/train", big), {"a": 8})
    folder = tmp_path / "out/train"
    pack_folder(source, tmp_path / "expected", max_samples=1)
    expected = files_below(tmp_path / "expected")
    # 32 or 64 KiB; the big image has 270. What coverage notes has no room, either.
    no_room = ("sh", "-c", 'ulimit -f 64; unset COVERAGE_PROCESS_CONFIG; exec "$@"', "sh")
    run = run_shard("pack", source.parent, folder.parent, *OPTIONS, "1", before=no_room)
    assert run.returncode == 1
    assert re.fullmatch(
        rf"shard\.py: error: \[Errno 27\] File too large: '{folder}/train-\d{{6}}\.tar'\n",
        run.stderr,
    )
    left, before = files_below(folder), identities(folder)
    assert left.pop(LOCK_NAME)
    assert 0 < len(left) < len(expected) - 2
    assert left.items() <= expected.items()
    finish(source.parent, folder, expected)
    assert {name: identities(folder)[name] for name in left}.items() <= before.items()


def test_space_is_looked_at_before_the_start(
    images_48: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little room for what is still to be made is said before the first shard is written."""
    job = Job(listing=scan(images_48 / "train"), store=LocalStore(tmp_path), split="train")
    size = sum(shard.bytes for shard in pack(job, workers=1).shards)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / "train-000000.tar").unlink()
    (tmp_path / "train-000000.npy").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda root: SimpleNamespace(free=size // 2))
    with pytest.raises(
        OSError, match=r"needs 0\.1 MB more and has 0\.\d MB free; the same command"
    ) as caught:
        pack(job, workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert [name for name in files_below(tmp_path) if not name.startswith(".")] == []
    monkeypatch.undo()
    assert pack(job, workers=1).samples == 48


def test_a_full_disk(images_48: Path, packed_48: dict[str, bytes], tmp_path: Path) -> None:
    """On a file system that fills up half a file goes, whole ones stay, and it goes on after."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f"""
        mount -t tmpfs -o size=24k none {place} || exit 99
        {SHARD_PY[0]} {SHARD_PY[1]} pack {images_48} {place} --max_samples 1 --workers 1
        status=$?
        ls -A {place}/train
        mount -o remount,size=4m {place}
        {SHARD_PY[0]} {SHARD_PY[1]} pack {images_48} {place} --max_samples 1 --workers 1 || exit 98
        cp -r {place}/train {tmp_path}/out
        exit $status
    """
    allowed = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"no mount of its own is allowed here: {allowed.stderr.decode().strip()}")
    # The check of space would find the disk too small: the interesting case is when it does not.
    hook = (
        b"import shutil\nimport types\n"
        b"shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)\n"
    )
    write_files(tmp_path / "site", {"sitecustomize.py": hook})
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "No space left on device: '" in run.stderr
    left = run.stdout.split("train: 48 images")[0].split()
    assert LOCK_NAME in left
    assert 2 < len(left) < 48
    assert not any(name.startswith(".tmp") for name in left)
    assert files_below(tmp_path / "out") == packed_48
