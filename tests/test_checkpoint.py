"""model/checkpoint.py: whole or not at all, and no code from a file."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch

from model.checkpoint import LAST, PREVIOUS, AtomicCheckpointIO
from model.hashes import BrokenCheckpointError, Content, check
from model.newest import newest_whole
from sharding.store import atomic_file

FILES = AtomicCheckpointIO(atomic_file)
NAMES = ("last.ckpt", "last.ckpt.xxh128", "last.previous.ckpt", "last.previous.ckpt.xxh128")


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    """Tensors and plain values are what they were; nothing else is left in the folder."""
    path = tmp_path / "new" / "last.ckpt"
    FILES.save_checkpoint({"weights": torch.arange(3), "step": 5}, path)
    FILES.save_checkpoint({"weights": torch.arange(4), "step": 6}, path)
    loaded = FILES.load_checkpoint(path)
    assert loaded["step"] == 6
    assert torch.equal(loaded["weights"], torch.arange(4))
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "last.ckpt",
        "last.ckpt.xxh128",
        "last.previous.ckpt",
        "last.previous.ckpt.xxh128",
    ]
    assert FILES.load_checkpoint(path.with_name(PREVIOUS))["step"] == 5
    FILES.remove_checkpoint(path)
    assert newest_whole(path.parent).path == path.with_name(PREVIOUS)


def test_a_full_disk_leaves_the_good_checkpoint_whole(tmp_path: Path) -> None:
    """When the write fails half way the file before it stays, and no temporary file does.

    The limit on a file's size fails a write as a full disk does, at any place, without root.
    """
    path = tmp_path / "last.ckpt"
    FILES.save_checkpoint({"step": 1}, path)
    program = f"""
import resource, signal, sys, torch
from model.checkpoint import AtomicCheckpointIO
from sharding.store import atomic_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    AtomicCheckpointIO(atomic_file).save_checkpoint({{"x": torch.zeros(100_000)}}, {str(path)!r})
except OSError as error:  # with the file's name, which the disk does not tell
    sys.exit(7 if error.filename == {str(path)!r} else 8)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 7
    assert FILES.load_checkpoint(path) == {"step": 1}
    assert {p.name for p in tmp_path.iterdir()} <= {*NAMES}
    assert newest_whole(tmp_path).path == path
    assert newest_whole(tmp_path).broken == []


CROWDED = """
import errno, os, sys, torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from model.checkpoint import AtomicCheckpointIO
from sharding.store import atomic_file
kind, path = sys.argv[1], sys.argv[2]
assert os.stat(os.environ["TMPDIR"]).st_dev != os.stat(os.path.dirname(path)).st_dev
files = TorchCheckpointIO() if kind == "lightning" else AtomicCheckpointIO(atomic_file)
files.save_checkpoint({"global_step": 1, "x": torch.zeros(1)}, path)
if kind == "ours":
    files.save_checkpoint({"global_step": 2, "x": torch.zeros(1)}, path)
try:
    files.save_checkpoint({"global_step": 3, "x": torch.zeros(1_000_000)}, path)
except (OSError, RuntimeError) as error:
    text = f"{error} {error.__context__}"
    assert "No space left" in text, text
else:
    sys.exit("there was room")
if kind == "ours":
    assert sorted(name for name in os.listdir(os.path.dirname(path))) == sorted(
        ["last.ckpt", "last.ckpt.xxh128", "last.previous.ckpt", "last.previous.ckpt.xxh128"]
    ), os.listdir(os.path.dirname(path))
    files.save_checkpoint({"global_step": 4}, path)  # there is room again
    print(files.load_checkpoint(path.replace("last", "last.previous"))["global_step"])
print(files.load_checkpoint(path)["global_step"])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_with_the_temporary_folder_elsewhere(tmp_path: Path) -> None:
    """The case in which Lightning's own writing destroys what it was about to replace.

    A disk of 1 MB, and a temporary folder with room on another one. What was there stays whole, no
    temporary file does, and when there is room again the next save works.
    """
    small, roomy = tmp_path / "small", tmp_path / "roomy"
    small.mkdir()
    roomy.mkdir()
    mounts = (
        f"mount -t tmpfs -o size=1m none {small} && mount -t tmpfs -o size=64m none {roomy} || "
        "exit 77\n"
    )

    def crowd(kind: str) -> subprocess.CompletedProcess[str]:
        program = f"{mounts} exec {sys.executable} - {kind} {small}/last.ckpt"
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", program],
            input=CROWDED,
            env=os.environ | {"TMPDIR": str(roomy), "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    done = crowd("ours")
    if done.returncode == 77 or "Operation not permitted" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "4"]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """A pickle that would call something is refused, also if the caller asks for everything."""

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(pickle.UnpicklingError):
        FILES.load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "pwned").exists()


class Deadly:
    """A process that is killed before its n-th effect on a folder: whatever is written or named."""

    def __init__(self, at: int, folder: Path) -> None:
        self._at = at
        self._folder = str(folder)
        self._effects = itertools.count(1)

    def count(self) -> None:
        """An effect comes."""
        if next(self._effects) == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(self, event: str, arguments: tuple[object, ...]) -> None:
        """Python tells of these itself."""
        here = arguments and str(arguments[0]).startswith(self._folder)
        if event in {"open", "os.rename", "os.link", "os.remove"} and here:
            self.count()

    @contextmanager
    def atomic_file(self, path: Path) -> Iterator[BinaryIO]:
        """Each write, and the two calls of fsync; half of a write's bytes may get through."""
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self.count()
            fsync(descriptor)
            self.count()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", counted)
            with atomic_file(path) as stream:
                yield cast("BinaryIO", Halves(stream, self))


class Halves:
    """A stream whose writes come in two halves, with an effect between them."""

    def __init__(self, stream: BinaryIO, deadly: Deadly) -> None:
        self._stream = stream
        self._deadly = deadly
        self._writes = itertools.count()

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()  # a killed process loses what stands in its buffers alone
        if next(self._writes) % 4 == 0:  # torch.save makes some 70
            self._deadly.count()
        self._stream.write(data[len(data) // 2 :])
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def save_until(effect: int, folder: Path, step: int = 3) -> int:
    """Save a step in a fork that is killed before its n-th effect; its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a fork beside threads
        child = os.fork()
    if not child:
        status = 1
        try:
            deadly = Deadly(effect, folder)
            sys.addaudithook(deadly.on_event)
            files = AtomicCheckpointIO(deadly.atomic_file)
            files.save_checkpoint(state(step), folder / LAST)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(step: int) -> dict[str, Any]:
    """A checkpoint."""
    return {"global_step": step, "x": torch.arange(100) + step}


def steps_in(folder: Path) -> dict[str, int]:
    """The step of each checkpoint of a folder. All are whole, and hold what their hashes say."""
    found = {}
    for path in folder.glob("*.ckpt"):
        claimed = check(path).step
        loaded = FILES.load_checkpoint(path)
        assert torch.equal(loaded["x"], state(loaded["global_step"])["x"])
        assert claimed == loaded["global_step"]
        found[path.name] = loaded["global_step"]
    return found


def test_sigkill_at_each_step_of_a_save(tmp_path: Path) -> None:
    """Whatever effect it dies before, the newest whole one is the old or the new; all are whole."""
    found = []
    for effect in itertools.count(1):
        folder = tmp_path / str(effect)
        for step in (1, 2):
            FILES.save_checkpoint(state(step), folder / LAST)
        status = save_until(effect, folder)
        there = steps_in(folder)
        assert there[LAST] in {2, 3}
        assert there[PREVIOUS] in {1, 2}
        newest = newest_whole(folder)
        assert newest.path == folder / LAST
        assert newest.broken == []
        found.append(there[LAST])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        FILES.save_checkpoint(state(4), folder / LAST)  # what was left is in nobody's way
        assert steps_in(folder) == {LAST: 4, PREVIOUS: there[LAST]}
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert effect > 40


def test_sigkill_in_one_save_after_another(tmp_path: Path) -> None:
    """A run that dies in each of its saves, wherever: nothing that was whole is lost.

    What two killed saves have announced may both be there, or neither.
    """
    for first in range(1, 60, 4):
        folder = tmp_path / str(first)
        for step in (1, 2):
            FILES.save_checkpoint(state(step), folder / LAST)
        for number in range(4):
            save_until(first + 3 * number, folder, step=3 + number)
            there = steps_in(folder)
            assert set(there) == {LAST, PREVIOUS}
            assert there[PREVIOUS] <= there[LAST]
            assert newest_whole(folder).broken == []


@pytest.mark.parametrize("hashes", [True, False], ids=["with hashes", "from elsewhere"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, hashes: bool) -> None:
    """The one before is taken, and what is wrong with the newest is said."""
    path = tmp_path / "last.ckpt"
    for step in (1, 2):
        FILES.save_checkpoint({"step": step, "x": torch.arange(1000)}, path)
    path.with_name(PREVIOUS).rename(tmp_path / "kept.ckpt")  # it shares no file with the last one
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"cut": data[: len(data) // 2], "flip": data, "empty": bytearray()}[damage]
    path.unlink()
    path.write_bytes(damaged)
    for leftover in tmp_path.glob("*.xxh128") if not hashes else ():
        leftover.unlink()
    found = newest_whole(tmp_path)
    assert found.path == tmp_path / "kept.ckpt"
    (line,) = found.broken
    assert str(path) in line
    with pytest.raises(BrokenCheckpointError, match=r"last\.ckpt"):
        FILES.load_checkpoint(path)


def test_a_broken_one_does_not_take_the_place_of_the_one_before(tmp_path: Path) -> None:
    """A run that went on from last.previous.ckpt keeps it until its own first save is whole."""
    path = tmp_path / LAST
    for step in (1, 2):
        FILES.save_checkpoint(state(step), path)
    previous = path.with_name(PREVIOUS)
    path.unlink()  # before, the two could share a file
    path.write_bytes(b"rubbish")
    AtomicCheckpointIO(atomic_file).save_checkpoint(state(3), path)
    assert steps_in(tmp_path) == {LAST: 3, PREVIOUS: 1}
    assert previous.exists()


def test_lost_hashes_are_made_anew(tmp_path: Path) -> None:
    """Without them, or with a torn file, the next save keeps the checkpoint and knows both."""
    for lost in (None, b"torn"):
        folder = tmp_path / str(lost)
        FILES.save_checkpoint(state(1), folder / LAST)
        hashes = folder / f"{LAST}.xxh128"
        if lost is None:
            hashes.unlink()
        else:
            hashes.write_bytes(lost)
        assert newest_whole(folder).path == folder / LAST
        AtomicCheckpointIO(atomic_file).save_checkpoint(state(2), folder / LAST)
        assert check(folder / PREVIOUS).step is None
        assert FILES.load_checkpoint(folder / PREVIOUS)["global_step"] == 1
        assert FILES.load_checkpoint(folder / LAST)["global_step"] == 2


def test_what_was_written_is_published(tmp_path: Path) -> None:
    """With what it holds, once it is whole; removals and the end are told as well."""
    told: list[object] = []

    class Publisher:
        def publish(self, path: Path, content: Content) -> None:
            assert check(path) == content
            told.append((path.name, content.step))

        def remove(self, name: str) -> None:
            told.append(name)

        def close(self) -> None:
            told.append("end")

    files = AtomicCheckpointIO(atomic_file, Publisher())
    files.save_checkpoint(state(1), tmp_path / LAST)
    files.save_checkpoint(state(2), tmp_path / "best.ckpt")
    files.remove_checkpoint(tmp_path / "best.ckpt")
    files.teardown()
    assert told == [(LAST, 1), ("best.ckpt", 2), "best.ckpt", "end"]


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    """An empty folder, a missing one, and one with rubbish alone."""
    for folder in (tmp_path, tmp_path / "none"):
        assert newest_whole(folder) == (None, [])
    (tmp_path / "last.ckpt").write_bytes(b"rubbish")
    assert newest_whole(tmp_path).path is None
    assert len(newest_whole(tmp_path).broken) == 1


def test_without_links_the_one_before_is_kept_as_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On file systems that have none (SMB, exFAT)."""

    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(source))

    monkeypatch.setattr(os, "link", no_links)
    plugin = AtomicCheckpointIO(atomic_file)
    for step in (1, 2, 3):
        plugin.save_checkpoint(state(step), tmp_path / LAST)
    assert steps_in(tmp_path) == {LAST: 3, PREVIOUS: 2}
    assert len(list(tmp_path.iterdir())) == 4
