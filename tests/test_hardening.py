"""Mistakes that were once made, each with the input that showed it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from webdataset.tariterators import base_plus_ext

import shard
from sharding import tar
from sharding.errors import DataError, UsageError
from sharding.index import SampleIndex
from sharding.manifest import Shard
from sharding.source import scan
from tests.make_images import (
    ENVIRONMENT,
    SHARD_PY,
    image_folder,
    pack_folder,
    run_shard,
    write_files,
)

ROOT = Path(SHARD_PY[1]).parent


def test_forked_worker_can_be_ended() -> None:
    """What multiprocessing calls to end a worker works on a deaf forked one."""
    program = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from sharding.process import FORK, start_forked_worker
import signal
arguments = dict(initializer=start_forked_worker, initargs=(os.getpid(),))
pool = ProcessPoolExecutor(3, mp_context=FORK, **arguments)
pool.submit(os.getpid).result()
def holder():  # who waits in read() holds the queue's lock; the others wait for the lock
    while True:
        for pid in list(pool._processes):
            if open(f"/proc/{pid}/syscall").read().split()[0] == "0": return pid
os.kill(holder(), signal.SIGKILL)
try:
    while True:
        pool.submit(os.getpid).result()
except BrokenProcessPool:
    pool.shutdown()
    print("ended")
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert run.stdout == "ended\n"


@pytest.mark.parametrize("out", ["closed pipe", "/dev/full"])
def test_output_lost(tmp_path: Path, out: str) -> None:
    """A reader that went away is no error; output lost to a full disk is status 1 and one line."""
    pack_folder(image_folder(tmp_path / "in", {"a": 1}), tmp_path / "out")
    if out == "/dev/full":
        writing = os.open(out, os.O_WRONLY)
    else:
        reading, writing = os.pipe()
        os.close(reading)
    run = subprocess.run(
        [*SHARD_PY, "info", tmp_path / "out"],
        check=False,
        stdout=writing,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    os.close(writing)
    if out == "/dev/full":
        assert run.returncode == 1
        assert run.stderr.startswith(b"shard.py: error: [Errno 28] No space left on device; free")
    else:
        assert (run.returncode, run.stderr) == (0, b"")


@pytest.mark.parametrize(
    "line",
    [
        "locate {out} --epoch 16777216 --step 0 --global_batch 1",
        "locate {out} --epoch 0 --step 0 --global_batch 1 --lanes 1048577",
        "locate {out} --epoch 0 --step 0 --global_batch 1 --window 16777217",
        f"locate {{out}} --epoch 0 --step 0 --global_batch 1 --seed {1 << 64}",
        f"pack x y --shard_size {'9' * 400}",
    ],
)
def test_options_out_of_range(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option out of its range is one line and status 2."""
    pack_folder(image_folder(tmp_path / "in", {"a": 2}), tmp_path / "out")
    try:
        status = shard.main(line.format(out=tmp_path / "out").split())
    except SystemExit as stop:  # argparse's own checks
        status = int(str(stop.code))
    assert status == 2


def test_foreign_npy_is_not_deleted(tmp_path: Path) -> None:
    """Packing deletes nothing that it did not make."""
    write_files(tmp_path / "out", {"features.npy": b"precious"})
    with pytest.raises(UsageError, match="not packed here"):
        pack_folder(image_folder(tmp_path / "in", {"a": 1}), tmp_path / "out")
    assert (tmp_path / "out/features.npy").exists()


def test_link_to_the_root(tmp_path: Path) -> None:
    """A link to the root of the split is a loop too."""
    write_files(tmp_path, {"a/x.jpg": b"1", "b/y.jpg": b"1"})
    (tmp_path / "a/loop").symlink_to("..")
    assert scan(tmp_path).paths == ["a/x.jpg", "b/y.jpg"]


def test_newline_in_a_name(tmp_path: Path) -> None:
    """Stock webdataset yields a sample whose folder has a dot and a newline."""
    key, extension = tar.member_name("a.\n/x.jpg")
    assert base_plus_ext(f"{key}.{extension}") == (key, extension)


def test_newline_in_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error about a name with a newline is one line."""
    write_files(tmp_path, {"in/a/x\n\x1b[31m.jpg": b"text"})
    assert shard.main(["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 3
    err = capsys.readouterr().err
    assert (err.count("\n"), "\x1b" in err) == (1, False)


def test_val_beside_a_damaged_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A validation split gets no labels of its own where the training split is unreadable."""
    image_folder(tmp_path / "in/train", {"a": 1, "b": 1})
    image_folder(tmp_path / "in/val", {"b": 1})
    assert shard.main(["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 0
    for path in (tmp_path / "out/val").iterdir():
        path.unlink()
    manifest = tmp_path / "out/train/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert (
        shard.main(["pack", str(tmp_path / "in/val"), str(tmp_path / "out"), "--workers", "1"]) == 3
    )


def header(shape: str, start: str = "{") -> bytes:
    """A .npy header that claims a shape."""
    text = (
        f"{start}'descr': [('offset','<u8')], 'fortran_order': False, 'shape': {shape}, }}".encode()
    )
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npz() -> bytes:
    """A zip of arrays, which numpy.load takes too."""
    buffer = io.BytesIO()
    np.savez(buffer, x=np.arange(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npz(),
        b"PK\x03\x04",
        header("(10**15,)"),
        header("(100000000000000,)"),
        header("(2,)", "\xd7"),
        header("(02,)"),
    ],
    ids=["AttributeError", "BadZipFile", "?", "MemoryError", "TokenError", "SyntaxError"],
)
def test_hostile_index(data: bytes) -> None:
    """Whatever an index holds, it is read or refused with DataError."""
    part = Shard(
        url="t", bytes=4096, samples=2, xxh128="", index_xxh128=xxhash.xxh3_128_hexdigest(data)
    )
    with pytest.raises(DataError):
        SampleIndex.from_bytes(data, shard=part, where="x")


ONE = Shard(url="t.tar", bytes=1, samples=1, xxh128="a", index_xxh128="b")


@pytest.mark.parametrize(
    "change",
    [{"shards": []}, {"split": "\ud800"}, {"shards": [{"samples": 10**30, "bytes": 1}]}],
    ids=["no shards", "surrogate", "10^30 samples"],
)
def test_hostile_manifest(tmp_path: Path, change: dict[str, object]) -> None:
    """A manifest that claims the impossible is refused, in one line."""
    split = pack_folder(image_folder(tmp_path / "in", {"a": 1}), tmp_path / "out")
    body = json.loads(split.manifest.to_json())
    if change.get("shards"):
        change["shards"] = [body["shards"][0] | change["shards"][0]]  # type: ignore[index]
    (tmp_path / "out/manifest.json").write_text(json.dumps(body | change))
    run = run_shard("info", tmp_path / "out")
    assert (run.returncode, run.stderr.count("\n")) == (3, 1)


def test_verify_with_a_killed_worker(tmp_path: Path) -> None:
    """A lost worker is one line and status 1."""
    pack_folder(image_folder(tmp_path / "in", {"a": 2}), tmp_path / "out", max_samples=1)
    program = (
        "import os, signal, sys, shard, sharding.verify as v\n"
        "die = lambda split, number, *, share, seed: os.kill(os.getpid(), signal.SIGKILL)\n"
        "v.check_shard.__code__ = die.__code__\n"
        "v.signal, v.os = signal, os\n"
        f"sys.argv[:] = ['shard.py', 'verify', {str(tmp_path / 'out')!r}, '--workers', '2']\n"
        "sys.exit(shard.main())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    "line", ["info {0}/in/a/a_0.JPEG", "pack {0}/in {0}/in/a/a_0.JPEG", "pack {0}/loop {0}/out"]
)
def test_wrong_paths(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A path of the wrong kind is the user's error."""
    image_folder(tmp_path / "in", {"a": 1})
    image_folder(tmp_path / "loop", {"a": 1})
    (tmp_path / "loop/a/self").symlink_to("self")
    assert shard.main(line.format(tmp_path).split()) in (2, 3)


def test_huge_file(tmp_path: Path) -> None:
    """A file that no index can hold is refused by its listed size, before it is read."""
    source = image_folder(tmp_path / "in", {"a": 1})
    os.truncate(source / "a/a_0.JPEG", 1 << 32)
    with pytest.raises(DataError):
        pack_folder(source, tmp_path / "out")


def test_empty_destination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty name of a data set is refused."""
    existed = Path("/train").exists()
    image_folder(tmp_path / "in", {"a": 1})
    try:
        assert shard.main(["pack", str(tmp_path / "in"), "", "--workers", "1"]) == 2
    finally:
        if not existed and Path("/train").exists():
            for path in Path("/train").iterdir():
                path.unlink()
            Path("/train").rmdir()
