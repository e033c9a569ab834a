"""Shards that several packers make, on Dask or in parts, and shards on S3: the same bytes."""

import itertools
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.errors import DataError, UsageError
from sharding.lock import Part
from sharding.manifest import MANIFEST_NAME, Packing
from sharding.pack import Job, pack, pack_part, seal
from sharding.source import scan
from sharding.store import LocalStore, open_store
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_images import (
    SHARD_PY,
    files_below,
    run_shard,
    write_files,
)
from tests.packers import OPTIONS, identities, put


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_and_seal(
    images_48: Path, packed_48: dict[str, bytes], tmp_path: Path, parts: int
) -> None:
    """Parts, made in any order, and the seal give the bytes of one packer."""
    arguments = (images_48, tmp_path, "--max_samples", "1", "--workers", "1")
    for part in reversed(range(parts)):
        early = run_shard("seal", *arguments)
        assert early.returncode in {2, 3}
        run = run_shard("pack", *arguments, "--part", f"{part}/{parts}")
        assert (run.returncode, run.stderr) == (0, "")
        assert f"part {part} of {parts}: {48 // parts} of 48 shards" in run.stdout
    assert MANIFEST_NAME not in files_below(tmp_path / "train")
    sealed = run_shard("seal", *arguments)
    assert (sealed.returncode, sealed.stderr) == (0, "")
    assert files_below(tmp_path / "train") == packed_48
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
    images_48: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """A shard that is missing or damaged is named, and there is no manifest; its part mends it."""
    job = Job(
        listing=scan(images_48 / "train"),
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


def test_seal_wants_the_options_of_pack(images_48: Path, tmp_path: Path) -> None:
    """Shards of other options are not sealed, and not removed either."""
    listing, store = scan(images_48 / "train"), LocalStore(tmp_path)
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
    images_48: Path, packed_48: dict[str, bytes], tmp_path: Path, killed: bool
) -> None:
    """Two workers of Dask, and one that is killed in a shard: the bytes of one packer, no rest."""
    hook = KILLED_ONCE.format(mark=str(tmp_path / "killed")) if killed else ""
    write_files(tmp_path / "site", {"sitecustomize.py": hook.encode()})
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    arguments = ("pack", images_48, tmp_path / "out", *OPTIONS, "2", "--cluster", "local")
    run = run_shard(*arguments, before=("env", f"PYTHONPATH={path}"))
    assert run.returncode == 0
    assert (tmp_path / "killed").exists() == killed
    assert files_below(tmp_path / "out/train") == packed_48


def test_packing_to_s3(
    images_48: Path, packed_48: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards go to S3 with the same bytes; what another plan left half done does not stay."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}/train")
    listing = scan(images_48 / "train")
    other = Job(listing=listing, store=store, split="train", packing=Packing(max_samples=3, seed=1))
    pack_part(other, Part(0, 4), workers=1)
    assert len(store.sizes()) == 8
    job = Job(listing=listing, store=store, split="train", packing=Packing(max_samples=1))
    with pytest.raises(UsageError, match="unfinished data set of other"):
        pack_part(job, Part(0, 2), workers=1)
    with pytest.raises(UsageError, match="with other options"):
        seal(job, workers=1)
    pack(job, workers=2)
    assert {name: store.read(name) for name in store.sizes()} == packed_48
    pack(job, workers=1)  # finds all as it should be
    with pytest.raises(UsageError, match="holds a finished data set"):
        pack(other, workers=1)
    store.delete(MANIFEST_NAME)
    with pytest.raises(UsageError, match="not packed here"):
        pack(job, workers=1)


def test_an_upload_that_was_killed_goes_on(
    images_48: Path, packed_48: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of a packer to S3, with its worker: the same command ends with the same bytes."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    url = f"s3://{BUCKET}/{tmp_path.name}"
    store = open_store(f"{url}/train")
    line = [*SHARD_PY, "pack", str(images_48), url, *OPTIONS, "2"]
    with subprocess.Popen(line, env=os.environ, start_new_session=True, stdout=-3) as process:
        while len(store.sizes()) < 20:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert MANIFEST_NAME not in store.sizes()
    subprocess.run(line, env=os.environ, check=True, stdout=-3)
    assert {name: store.read(name) for name in store.sizes()} == packed_48
