"""Packing: the same bytes whatever happens on the way, and what is refused."""

import errno
import gc
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset as wds

from sharding import tar
from sharding.errors import DataError, UsageError
from sharding.lock import LOCK_NAME, Part
from sharding.manifest import MANIFEST_NAME, Packing
from sharding.pack import Job, pack, pack_part, seal
from sharding.source import scan
from sharding.store import LocalStore, open_store
from tests.fault_proxy import BUCKET, s3_endpoint
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

OPTIONS = ("--max_samples", "1", "--workers")
Packer = subprocess.Popen[str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose train/ has one image for each of 48 shards of one sample."""
    root = tmp_path_factory.mktemp("source")
    image_folder(root / "train", {"a": 20, "b c": 20, "été": 8})
    return root


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed packer makes of `source`: every file's bytes."""
    destination = tmp_path_factory.mktemp("expected")
    pack_folder(source / "train", destination, max_samples=1)
    return files_below(destination)


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


def finish(source: Path, folder: Path, expected: dict[str, bytes]) -> None:
    """The same command again ends well, with the bytes of an undisturbed run and nothing else."""
    again = run_shard("pack", source, folder.parent, *OPTIONS, "2")
    assert (again.returncode, again.stderr) == (0, "")
    assert files_below(folder) == expected


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file: another one was written anew."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_same_input_same_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    """Another copy of the images, packed by the program, gives the same bytes in every file."""
    shutil.copytree(source, tmp_path / "copy")
    run = run_shard("pack", tmp_path / "copy", tmp_path / "out", *OPTIONS, workers)
    assert (run.returncode, run.stderr) == (0, "")
    assert files_below(tmp_path / "out/train") == expected


def test_every_reader_gives_the_folder_back(tmp_path: Path) -> None:
    """Stock webdataset, tarfile and GNU tar each give every image back, and its label."""
    files = {
        "n1/plain.JPEG": image(1),
        "n1/two.dots.jpg": image(2),
        "n1/100%.png": image(3, "PNG"),
        "n1/sub/deep.webp": image(4, "WEBP"),
        "été/ü ñ 日本.jpg": image(5),
        "__n__/__x__.jpg": image(6),
        f"n1/{'long' * 60}.jpg": image(7),
        "n2/n02105855_2933.JPEG": image(8, "PNG"),  # keeps its name and bytes
        "n2/cmyk.jpg": image(9, mode="CMYK"),
    }
    split = pack_folder(write_files(tmp_path / "in", files), tmp_path / "out", max_samples=4)
    names = [str(tmp_path / "out" / shard.url) for shard in split.manifest.shards]
    classes = split.manifest.classes
    labels = {path: b"%d" % classes.index(path.split("/")[0]) for path in files}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        samples = {tar.path_of(s["__key__"]): s for s in wds.WebDataset(names, shardshuffle=False)}
        gc.collect()
    assert len(samples) == len(files)
    for path, data in files.items():
        key, _, extension = path.rpartition(".")
        assert samples[key][extension.lower()] == data
        assert samples[key]["cls"] == labels[path]

    whole = files | {path.rpartition(".")[0] + ".cls": label for path, label in labels.items()}
    (tmp_path / "gnu").mkdir()
    for name in names:
        subprocess.run(["tar", "xf", name], cwd=tmp_path / "gnu", check=True)
        with tarfile.open(name) as archive:
            archive.extractall(tmp_path / "python", filter="data")
    for folder in ("gnu", "python"):
        assert {tar.path_of(n): d for n, d in files_below(tmp_path / folder).items()} == whole


@pytest.mark.parametrize("kill", [os.killpg, os.kill], ids=["group", "parent"])
@pytest.mark.parametrize(
    "moment", ["train-000000.tar", "train-000016.tar", "train-000016.npy", MANIFEST_NAME]
)
def test_sigkill(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    moment: str,
    kill: Callable[[int, int], None],
) -> None:
    """A packer killed with its workers, or alone, leaves none, and the same command finishes."""
    folder = tmp_path / "train"
    with packer(source, folder, moment) as (process, workers):
        descriptors = [os.pidfd_open(worker) for worker in workers]
        kill(process.pid, signal.SIGKILL)
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], 10)[0] == [descriptor]  # it has ended
            os.close(descriptor)
    assert len(workers) == (0 if moment == MANIFEST_NAME else 2)
    assert moment not in os.listdir(folder)
    assert any(name.startswith(".tmp-") for name in os.listdir(folder))
    finish(source, folder, expected)


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
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    *,
    number: int,
    status: int,
    message: str,
) -> None:
    """A packer that gets Ctrl-C or loses its workers says so; the same command goes on."""
    with packer(source, tmp_path / "train", "train-000016.tar") as (process, workers):
        for victim in workers if number == signal.SIGKILL else [-process.pid]:
            os.kill(victim, number)
        os.killpg(process.pid, signal.SIGCONT)
        errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors.count("\n")) == (status, 1)
    assert errors.startswith(f"shard.py: error: {message}")
    finish(source, tmp_path / "train", expected)


def test_second_packer(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A second packer fails at once and names the first; when that is killed, its lock is free."""
    write_files(tmp_path / "train", {LOCK_NAME: b'{"host": "gone", "pid": 1}'})
    with packer(source, tmp_path / "train", "train-000000.tar") as (first, _):
        second = run_shard("pack", source, tmp_path, *OPTIONS, "2")
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"another packer is at work on {tmp_path}/train: host " in second.stderr
    assert second.stderr.endswith(f"process {first.pid}\n")
    finish(source, tmp_path / "train", expected)


def swap(folder: Path, *extensions: str) -> None:
    """Exchange these files of shards 0 and 1."""
    for extension in extensions:
        one, other = (folder / f"train-00000{i}.{extension}" for i in (0, 1))
        one.rename(folder / "between")
        other.rename(one)
        (folder / "between").rename(other)


def put(path: Path, at: int) -> None:
    """Put other bytes into a file, `at` from its end if that is negative."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(b"\xaa")


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


def test_finished_data_set_is_left_alone(tmp_path: Path) -> None:
    """The same command on a finished data set succeeds and writes nothing anew."""
    source = image_folder(tmp_path / "in", {"a": 3})
    first = pack_folder(source, tmp_path / "out", max_samples=2)
    before = identities(tmp_path / "out")
    assert pack_folder(source, tmp_path / "out", max_samples=2).manifest == first.manifest
    assert identities(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda _: None, {"seed": 1}),
        (lambda _: None, {"max_samples": 1}),
        (lambda _: None, {"shard_bytes": 1 << 20}),  # the same shards, by other options
        (lambda root: write_files(root, {"in/a/new.jpg": image(99)}), {}),
        (lambda root: write_files(root, {"in/b/new.jpg": image(99)}), {}),
        (lambda root: put(root / "out/train-000000.tar", 700), {}),  # damage: not repaired silently
    ],
    ids=["seed", "samples", "size", "another image", "another class", "damage"],
)
def test_finished_data_set_is_not_overwritten(
    tmp_path: Path, change: Callable[[Path], object], options: dict[str, int]
) -> None:
    """Other options or images than those of a finished data set are refused; it stays as it is."""
    source = image_folder(tmp_path / "in", {"a": 3})
    pack_folder(source, tmp_path / "out", max_samples=2)
    change(tmp_path)
    before = identities(tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds a finished data set that .*or a damaged one"):
        pack_folder(source, tmp_path / "out", **{"max_samples": 2, **options})
    assert identities(tmp_path / "out") == before


def test_foreign_tars_are_not_touched(tmp_path: Path) -> None:
    """A folder with tars that were not packed there is refused and stays as it is."""
    write_files(tmp_path / "out", {"backup.tar": b"precious", "notes.txt": b"1"})
    before = identities(tmp_path / "out")
    with pytest.raises(UsageError, match="files that were not packed here"):
        pack_folder(image_folder(tmp_path / "in", {"a": 1}), tmp_path / "out")
    assert identities(tmp_path / "out") == before


def test_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that cannot be written leaves no half file; earlier shards stay, and it goes on."""
    big = {"a/big.png": image(9, "PNG", size=(300, 300))}
    source = image_folder(write_files(tmp_path / "in/train", big), {"a": 8})
    folder = tmp_path / "out/train"
    pack_folder(source, tmp_path / "expected", max_samples=1)
    expected = files_below(tmp_path / "expected")
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # its file would have no room
    no_room = ("sh", "-c", 'ulimit -f 64; exec "$@"', "sh")  # 32 or 64 KiB; the big image has 270
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/notes.jpg": b"hello"}, r"/a/notes\.jpg is no JPEG, PNG or WebP image \(5 bytes"),
        ({"a/zero.jpg": b""}, r"/a/zero\.jpg is empty; repair"),
        ({"a/gif.png": image(0, "GIF")}, r"/a/gif\.png is no JPEG"),
        (
            {"a/x.jpg": image(1), "a/x.png": image(2, "PNG")},
            r"^/.*/a/x\.jpg and /.*/a/x\.png would share the key 'a/x'",
        ),
        (
            {"a/x.jpg": image(1), "a/x.JPG": image(2)},
            r"^/.*/a/x\.JPG and /.*/a/x\.jpg would share the key 'a/x'",
        ),
    ],
    ids=itertools.count(),
)
def test_bad_files(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    """A file that cannot be packed is named, and there is no data set until it is gone."""
    source = write_files(tmp_path / "in", {"a/good.jpg": image(0), **files})
    with pytest.raises(DataError, match=message):
        pack_folder(source, tmp_path / "out")
    assert not list(tmp_path.glob("out/[.m]*json*")) + list(tmp_path.glob("out/.tmp-*"))
    for name in files:
        (source / name).unlink()
    assert pack_folder(source, tmp_path / "out").manifest.samples == 1


def test_a_shared_key_in_a_flat_folder(tmp_path: Path) -> None:
    """The files are named where they stand, not by the class that a label gives them."""
    root = write_files(tmp_path / "in", dict.fromkeys(["x.jpg", "x.png"], b"1"))
    listing = scan(root, class_of={"x.jpg": "a", "x.png": "a"})
    message = f"^{root}/x.jpg and {root}/x.png would share the key 'a/x'"
    with pytest.raises(DataError, match=message):
        Job(listing=listing, store=LocalStore(tmp_path / "out"), split="val")


@pytest.mark.parametrize("change", [b"", image(0)[:-1], image(0) + b"1", None])
def test_file_changed_while_packing(tmp_path: Path, change: bytes | None) -> None:
    """A file that was emptied, cut, grew or went between the scan and its turn is named."""
    listing = scan(image_folder(tmp_path / "in", {"a": 1}))
    (tmp_path / "in/a/a_0.JPEG").unlink()
    write_files(tmp_path / "in", {} if change is None else {"a/a_0.JPEG": change})
    with pytest.raises(DataError, match=r"/a/a_0\.JPEG changed while packing"):
        pack(Job(listing=listing, store=LocalStore(tmp_path / "out"), split="train"), workers=1)


@pytest.mark.parametrize(("width", "found"), [(65_535, (65_535, 1)), (65_536, (0, 0))])
def test_size_of_an_image(tmp_path: Path, width: int, found: tuple[int, int]) -> None:
    """A PNG named .JPEG has a PNG's size; one wider than the index's 16 bits has an unknown one."""
    source = write_files(tmp_path / "in", {"a/x.JPEG": image(0, "PNG", size=(width, 1))})
    (row,) = pack_folder(source, tmp_path / "out").read_index(0).table
    assert (row["width"], row["height"]) == found


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_and_seal(
    source: Path, expected: dict[str, bytes], tmp_path: Path, parts: int
) -> None:
    """Parts, made in any order, and the seal give the bytes of one packer."""
    arguments = (source, tmp_path, "--max_samples", "1", "--workers", "1")
    for part in reversed(range(parts)):
        early = run_shard("seal", *arguments)
        assert early.returncode in {2, 3}
        run = run_shard("pack", *arguments, "--part", f"{part}/{parts}")
        assert (run.returncode, run.stderr) == (0, "")
        assert f"part {part} of {parts}: {48 // parts} of 48 shards" in run.stdout
    assert MANIFEST_NAME not in files_below(tmp_path / "train")
    sealed = run_shard("seal", *arguments)
    assert (sealed.returncode, sealed.stderr) == (0, "")
    assert files_below(tmp_path / "train") == expected
    assert run_shard("seal", *arguments).returncode == 0
    again = run_shard("pack", *arguments, "--part", "0/3")
    assert (again.returncode, "was sealed already" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-000004.tar").unlink(), "1 of 48 .*: train-000004.tar;"),
        (lambda folder: put(folder / "train-000005.tar", 700), "1 of 48 .*: train-000005.tar;"),
        (lambda folder: put(folder / "train-000006.npy", -1), "1 of 48 .*: train-000006.tar;"),
        (lambda folder: [p.unlink() for p in folder.glob("*.npy")], r"48 of 48 .*, \.\.\.;"),
    ],
    ids=itertools.count(),
)
def test_seal_reads_every_shard(
    source: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """A shard that is missing or damaged is named, and there is no manifest; its part mends it."""
    job = Job(
        listing=scan(source / "train"),
        store=LocalStore(tmp_path),
        split="train",
        packing=Packing(max_samples=1),
    )
    pack_part(job, Part(0, 1), workers=1)
    damage(tmp_path)
    with pytest.raises(DataError, match=rf"{message} run their parts again$"):
        seal(job, workers=2)
    assert MANIFEST_NAME not in files_below(tmp_path)
    pack_part(job, Part(0, 1), workers=1)
    assert seal(job, workers=1).samples == 48


def test_seal_wants_the_options_of_pack(source: Path, tmp_path: Path) -> None:
    """Shards of other options are not sealed, and not removed either."""
    listing, store = scan(source / "train"), LocalStore(tmp_path)
    job = Job(listing=listing, store=store, split="train", packing=Packing(max_samples=2))
    pack_part(job, Part(0, 1), workers=1)
    before = identities(tmp_path)
    other = Job(listing=listing, store=store, split="train", packing=Packing(max_samples=3))
    with pytest.raises(UsageError, match="with other options"):
        seal(other, workers=1)
    assert {name: identities(tmp_path)[name] for name in before} == before


KILLED_ONCE = """
import os, signal, sys
def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("train-000007.tar"):
        try:
            os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_dask_makes_the_same_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, killed: bool
) -> None:
    """Two workers of Dask, and one that is killed in a shard: the bytes of one packer, no rest."""
    hook = KILLED_ONCE.format(mark=str(tmp_path / "killed")) if killed else ""
    write_files(tmp_path / "site", {"sitecustomize.py": hook.encode()})
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    arguments = ("pack", source, tmp_path / "out", *OPTIONS, "2", "--cluster", "local")
    run = run_shard(*arguments, before=("env", f"PYTHONPATH={path}"))
    assert run.returncode == 0
    assert (tmp_path / "killed").exists() == killed
    assert files_below(tmp_path / "out/train") == expected


def test_space_is_looked_at_before_the_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little room for what is still to be made is said before the first shard is written."""
    job = Job(listing=scan(source / "train"), store=LocalStore(tmp_path), split="train")
    size = sum(shard.bytes for shard in pack(job, workers=1).shards)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / "train-000000.tar").unlink()
    (tmp_path / "train-000000.npy").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda root: SimpleNamespace(free=size // 2))
    with pytest.raises(
        OSError, match=r"needs 0\.0 GB more and has 0\.0 GB free; make space"
    ) as caught:
        pack(job, workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert [name for name in files_below(tmp_path) if not name.startswith(".")] == []
    monkeypatch.undo()
    assert pack(job, workers=1).samples == 48


def test_a_full_disk(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """On a file system that fills up half a file goes, whole ones stay, and it goes on after."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f"""
        mount -t tmpfs -o size=24k none {place} || exit 99
        {SHARD_PY[0]} {SHARD_PY[1]} pack {source} {place} --max_samples 1 --workers 1
        status=$?
        ls -A {place}/train
        mount -o remount,size=4m {place}
        {SHARD_PY[0]} {SHARD_PY[1]} pack {source} {place} --max_samples 1 --workers 1 || exit 98
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
    assert files_below(tmp_path / "out") == expected


def test_packing_to_s3(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards go to S3 with the same bytes; what another plan left half done does not stay."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}/train")
    listing = scan(source / "train")
    other = Job(listing=listing, store=store, split="train", packing=Packing(max_samples=3, seed=1))
    pack_part(other, Part(0, 4), workers=1)
    assert len(store.sizes()) == 8
    job = Job(listing=listing, store=store, split="train", packing=Packing(max_samples=1))
    with pytest.raises(UsageError, match="unfinished data set of other"):
        pack_part(job, Part(0, 2), workers=1)
    with pytest.raises(UsageError, match="with other options"):
        seal(job, workers=1)
    pack(job, workers=2)
    assert {name: store.read(name) for name in store.sizes()} == expected
    pack(job, workers=1)  # finds all as it should be
    with pytest.raises(UsageError, match="holds a finished data set"):
        pack(other, workers=1)
    store.delete(MANIFEST_NAME)
    with pytest.raises(UsageError, match="not packed here"):
        pack(job, workers=1)


def test_an_upload_that_was_killed_goes_on(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of a packer to S3, with its worker: the same command ends with the same bytes."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    url = f"s3://{BUCKET}/{tmp_path.name}"
    store = open_store(f"{url}/train")
    line = [*SHARD_PY, "pack", str(source), url, *OPTIONS, "2"]
    with subprocess.Popen(line, env=os.environ, start_new_session=True, stdout=-3) as process:
        while len(store.sizes()) < 20:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert MANIFEST_NAME not in store.sizes()
    subprocess.run(line, env=os.environ, check=True, stdout=-3)
    assert {name: store.read(name) for name in store.sizes()} == expected
