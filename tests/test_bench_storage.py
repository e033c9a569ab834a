"""bench_storage: the library that slows calls down, that it reaches the workers, and the tables."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from loaders import decode
from scripts import bench_storage
from scripts.bench_storage import Case, Measurement, measure, slow_environment
from sharding.errors import UsageError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)

OPEN_MS, READ_MS = 4.0, 3.0

# Prints, for each call: its name, what was counted (opens, stats, reads), and its milliseconds.
CALLS = """
import json, os, struct, sys, time
slow, other = sys.argv[1:]
name = slow + "/file"
def counters():
    with open(os.environ["SLOW_STORAGE_COUNTS"], "rb") as counts:
        return struct.unpack("4Q", counts.read())
folder, opened = os.open(slow, os.O_RDONLY), os.open(name, os.O_RDONLY)
elsewhere = os.open(other, os.O_RDONLY)
def forked():
    if not (pid := os.fork()):
        os.stat(name)
        os._exit(0)
    os.waitpid(pid, 0)
def relative():
    os.chdir(slow)
    os.stat("file")
    os.chdir("/")
calls = {
    "open": lambda: os.close(os.open(name, os.O_RDONLY)),
    "create": lambda: os.close(os.open(slow + "/new", os.O_WRONLY | os.O_CREAT, 0o640)),
    "openat": lambda: os.close(os.open("file", os.O_RDONLY, dir_fd=folder)),
    "open and read": lambda: open(name, "rb").read(),
    "stat": lambda: os.stat(name),
    "stat the folder": lambda: os.stat(slow),
    "lstat": lambda: os.lstat(name),
    "fstatat": lambda: os.stat("file", dir_fd=folder),
    "scandir": lambda: [entry.stat() for entry in os.scandir(slow) if entry.name == "file"],
    "relative": relative,
    "missing": lambda: os.path.exists(slow + "/missing"),
    "forked": forked,
    "read": lambda: os.read(opened, 2),
    "pread": lambda: os.pread(opened, 3, 1),
    "preadv": lambda: os.preadv(opened, [bytearray(3)], 1),
    "end of file": lambda: os.pread(opened, 3, 100),
    "fstat": lambda: os.fstat(opened),
    "elsewhere": lambda: (os.stat(other), open(other).read(), os.pread(elsewhere, 1, 0)),
    "a longer name": lambda: os.path.exists(slow + "er"),
}
for what, call in calls.items():
    before, start = counters(), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    *counted, slept = (b - a for a, b in zip(before, counters()))
    assert slept <= seconds * 1e9, (what, slept, seconds)
    print(json.dumps([what, counted, seconds * 1e3]))
"""
COUNTED = {
    "open": [1, 0, 0],
    "create": [1, 0, 0],
    "openat": [1, 0, 0],
    "open and read": [1, 0, 1],
    "stat": [0, 1, 0],
    "stat the folder": [0, 1, 0],
    "lstat": [0, 1, 0],
    "fstatat": [0, 1, 0],
    "scandir": [0, 1, 0],
    "relative": [0, 1, 0],
    "missing": [0, 1, 0],
    "forked": [0, 1, 0],
    "read": [0, 0, 1],
    "pread": [0, 0, 1],
    "preadv": [0, 0, 1],
    "end of file": [0, 0, 0],
    "fstat": [0, 0, 0],
    "elsewhere": [0, 0, 0],
    "a longer name": [0, 0, 0],
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library."""
    out = tmp_path_factory.mktemp("library") / "slow_storage.so"
    bench_storage.compile_library(out)
    return out


def test_each_call_below_the_prefix_is_counted_and_delayed(library: Path, tmp_path: Path) -> None:
    """Opens, stats and reads, by all names and in forks; nothing else, and nothing elsewhere."""
    slow, other = tmp_path / "slow", tmp_path / "other"
    slow.mkdir()
    (slow / "file").write_bytes(b"12345")
    other.write_bytes(b"12345")
    case = Case(format="shards", open_ms=OPEN_MS, read_ms=READ_MS)
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(slow), str(other)],
        env=os.environ | slow_environment(library, slow, case, tmp_path / "counts"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {what: counted for what, counted, _ in found} == COUNTED
    for what, (opens, stats, reads), took_ms in found:
        assert took_ms >= (opens + stats) * OPEN_MS + reads * READ_MS, what
    assert (slow / "new").stat().st_mode & 0o777 == 0o640 & ~_umask()


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_what_cannot_be_counted_ends_the_process(library: Path, tmp_path: Path) -> None:
    """A delay that nobody could prove is worse than none."""
    case = Case(format="shards", open_ms=1, read_ms=0)
    environment = slow_environment(library, tmp_path, case, tmp_path / "counts")
    (tmp_path / "counts").unlink()
    done = subprocess.run(
        ["true"], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "slow_storage: cannot count in" in done.stderr


@pytest.mark.skipif(find_spec("loaders._jpeg") is None, reason="the region decoder was not built")
def test_the_delay_reaches_the_workers_of_the_loader(
    library: Path, small_images: Path, tmp_path: Path
) -> None:
    """Workers, forked by a server, read all that is counted: each open and each sleep is there."""
    assert bench_storage.make_data(small_images / "train", tmp_path, 160) == 51
    found = {
        name: measure(
            Case(format=name, open_ms=OPEN_MS, read_ms=READ_MS),
            tmp_path,
            library,
            workers=2,
            batch=4,
        )
        for name in bench_storage.FORMATS
    }
    folder, shards = found["imagefolder"], found["shards"]
    assert folder.images == shards.images == 160 - 10 * 4
    ahead = 2 * 5 * 4  # what two workers may have made ahead, at either end
    for counted in (folder.opens, folder.reads):
        assert folder.images - ahead <= counted <= folder.images + ahead
    assert folder.slept_ns >= (folder.opens * OPEN_MS + folder.reads * READ_MS) * 1e6
    assert folder.first_batch_seconds >= 160 * OPEN_MS / 1e3  # the listing: a stat for each file
    assert shards.opens <= 4  # one shard: tar and index, for each of two workers


def test_a_measurement_that_fails_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends badly, or not at all, is an error that names the case."""
    case = Case(format="shards", open_ms=5, read_ms=0)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho why >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    library = tmp_path / "none.so"
    with pytest.raises(ChildProcessError, match=r"shards, 5 ms an open, 0 ms a read: why"):
        measure(case, tmp_path, library, workers=1, batch=1)
    program.write_text("#!/bin/sh\n")
    with pytest.raises(ChildProcessError, match=r"none\.so was not loaded"):
        measure(case, tmp_path, library, workers=1, batch=1)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(bench_storage, "TIMEOUT_S", 0.2)
    with pytest.raises(ChildProcessError, match=r"not done in 0\.2 s"):
        measure(case, tmp_path, library, workers=1, batch=1)


def measurement(rate: float, *, opens: int = 300, first: float = 1.0) -> Measurement:
    """Of 300 images at this rate."""
    return Measurement(
        images=300,
        seconds=300 / rate,
        first_batch_seconds=first,
        opens=opens,
        stats=0,
        reads=600,
        slept_ns=0,
    )


def made_up() -> dict[Case, list[Measurement]]:
    """Three rounds of each case; shards keep 98% at 5 ms, and 50% with slow reads."""
    rates = {
        ("imagefolder", 0.0, 0.0): 900,
        ("imagefolder", 5.0, 0.0): 300,
        ("shards", 0.0, 0.0): 1000,
        ("shards", 5.0, 0.0): 980,
        ("shards", 5.0, 1.0): 500,
    }
    return {
        Case(format=name, open_ms=open_ms, read_ms=read_ms): [
            measurement(rate * factor) for factor in (0.5, 1.0, 1.1)
        ]
        for (name, open_ms, read_ms), rate in rates.items()
    }


def test_medians_ratios_and_verdicts() -> None:
    """Ratios are to the same format without any delay; the verdict is of shards at most delay."""
    rows = bench_storage.summarize(made_up())
    assert [row.median for row in rows] == pytest.approx([900, 300, 1000, 980, 500])
    assert [row.kept for row in rows] == pytest.approx([1, 1 / 3, 1, 0.98, 0.5])
    assert (rows[0].opens, rows[0].reads) == (1, 2)
    verdicts = list(bench_storage.verdicts(rows).items())
    assert verdicts == [
        (
            "shards, 5 ms an open, 0 ms a read: at least 97% of the speed without delays",
            "kept (98.0%, fastest rounds 98.0%)",
        ),
        (
            "shards, 5 ms an open, 1 ms a read: at least 95% of the speed without delays",
            "missed (50.0%, fastest rounds 50.0%)",
        ),
    ]
    assert bench_storage.tables(rows).count("ms a read;") == 2


def test_the_program_measures_all_cases_and_writes_what_it_found(
    small_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each round measures each case once, beginning with another one; JSON and plot are written."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(decode, "get_decoder", lambda name: None)
    order: list[Case] = []

    def fake(case: Case, *_: Path, **__: int) -> Measurement:
        order.append(case)
        return measurement(1000 - case.open_ms * 100)

    monkeypatch.setattr(bench_storage, "measure", fake)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--images", str(small_images / "train"), "--delays", "2", "--rounds", "2"]
    arguments += ["--count", "120", "--batch", "8", "--json", str(out), "--plot", str(picture)]
    assert bench_storage.main(arguments) == 0
    assert len(order) == 2 * 8
    assert set(order[:8]) == set(order[8:])
    assert order[0] == order[15] != order[8]
    facts = json.loads(out.read_text())
    assert len(facts["rounds"]) == 16
    assert len(facts["machine"]["load_average"]) == 2
    assert picture.stat().st_size > 1000
    order.clear()
    assert bench_storage.main([*arguments, "--formats", "shards", "--read_ms", "0"]) == 0
    assert [case.open_ms for case in order] == [0, 2, 2, 0]
    printed = capsys.readouterr().out
    assert "51 photos" in printed
    assert "missed (80.0%, fastest rounds 80.0%)" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give --images FOLDER"),
        (["--images", "{empty}", "--count", "500"], "--workers and --batch ask for 768"),
        (["--images", "{empty}"], "no *.jpg or *.jpeg in it"),
        (["--images", "{empty}", "--work", "{full}"], "is not empty"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the option and its value."""
    monkeypatch.setattr(decode, "get_decoder", lambda name: None)
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    (full / "x").mkdir(parents=True)
    words = [word.format(empty=empty, full=full) for word in arguments]
    assert bench_storage.main(words) in {2, 3}
    assert text in capsys.readouterr().err


def test_no_compiler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install; source that it cannot build is an error too."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no C compiler `cc`.*apt-get install gcc"):
        bench_storage.compile_library(tmp_path / "out.so")
    (tmp_path / "cc").write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    with pytest.raises(UsageError, match=r"cannot build .*slow_storage\.c: no headers"):
        bench_storage.compile_library(tmp_path / "out.so")
