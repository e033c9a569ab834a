"""Stores: one contract that every store keeps, then what is LocalStore's own."""

import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharding.errors import DataError, UsageError
from sharding.s3 import S3Store
from sharding.store import LocalStore, Store, locate, open_store
from tests.fault_proxy import s3_endpoint
from tests.s3_stores import put

BYTES = bytes(range(256)) * 8


def open_like(store: Store, url: str) -> Store:
    """Another store of the same kind."""
    return (
        LocalStore(Path(url))
        if isinstance(store, LocalStore)
        else S3Store(url, endpoint=s3_endpoint())
    )


def test_objects(store: Store) -> None:
    """Objects are listed with sizes, read back, replaced and deleted; a new store has none."""
    assert store.sizes() == {}
    put(store, "a.tar", BYTES)
    put(store, "a.npy", BYTES)
    put(store, "a.npy", b"newer")
    put(store, "gone", b"")
    store.delete("gone")
    store.delete("gone")
    assert store.sizes() == {"a.tar": len(BYTES), "a.npy": 5}
    assert (store.read("a.tar"), store.read("a.npy")) == (BYTES, b"newer")
    for missing in (store.read, store.open):
        with pytest.raises(FileNotFoundError):
            missing("gone")


def test_an_object_appears_whole_or_not_at_all(store: Store) -> None:
    """Readers see the old object until its writer is done, and keep it if the writer fails."""

    def fail() -> None:
        with store.create("a") as stream:
            stream.write(BYTES)
            stream.flush()
            assert store.read("a") == b"old"
            raise ZeroDivisionError

    put(store, "a", b"old")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert (store.sizes(), store.read("a")) == ({"a": 3}, b"old")
    if isinstance(store, LocalStore):
        assert os.listdir(store.root) == ["a"]


def test_only_what_lies_directly_in_the_folder_is_listed(store: Store) -> None:
    """Hidden objects and what lies deeper or beside the folder are not the store's."""
    for place in ("a", ".packing", "a.tar"):
        put(store, place, b"1")
    put(open_like(store, f"{store.url}/deeper"), "b", b"1")
    put(open_like(store, f"{store.url}-2"), "c", b"1")
    assert store.sizes() == {"a": 1, "a.tar": 1}


def test_stores_and_blobs_are_read_in_other_processes(store: Store) -> None:
    """A pickled store reads the same objects; a blob serves threads at once."""
    put(store, "a", BYTES)
    assert pickle.loads(pickle.dumps(store)).read("a") == BYTES
    blob = store.open("a")
    with ThreadPoolExecutor(8) as pool:
        pieces = pool.map(lambda first: blob.read_at(first, 64), range(0, len(BYTES), 64))
        assert b"".join(pieces) == BYTES


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, len(BYTES) + 9), st.integers(0, len(BYTES) + 9))
def test_ranged_reads(store: Store, offset: int, size: int) -> None:
    """A range inside the object is read exactly; one that ends behind it raises DataError."""
    if not store.sizes():
        put(store, "a", BYTES)
    blob = store.open("a")
    assert blob.size == len(BYTES)
    if size and offset + size > len(BYTES):
        with pytest.raises(DataError, match=f"{size} bytes are needed from {offset}"):
            blob.read_at(offset, size)
    else:
        assert blob.read_at(offset, size) == BYTES[offset : offset + size]


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ is what a shell makes of it; names that begin with it are names."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/a").url == f"{tmp_path}/a"
    assert (open_store("~").url, open_store("~a").url) == (str(tmp_path), "~a")


def test_local_files(tmp_path: Path) -> None:
    """Shards are readable for all; hidden files and folders are no objects; blobs close."""
    for name in (".tmp-x", ".packing", "folder/b"):
        put(LocalStore((tmp_path / name).parent), (tmp_path / name).name, b"1")
    local = LocalStore(tmp_path)
    put(local, "a", b"1")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert local.sizes() == {"a": 1}
    local.sweep()
    assert sorted(os.listdir(tmp_path)) == [".packing", "a", "folder"]
    before = os.listdir("/proc/self/fd")
    local.open("a")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("url", ["pipe://touch x", "http://h/d", "S3://b/p", "://x", "File:///tmp"])
def test_other_schemes_are_refused(url: str) -> None:
    """A scheme without a backend is refused and named; nothing is handed to a shell."""
    with pytest.raises(UsageError, match=f"cannot open '{url}'"):
        open_store(url)


def test_s3_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    """An s3:// URL without boto3 is a UsageError that says what to install."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    for name in ("s3", "s3_client"):
        monkeypatch.delitem(sys.modules, f"sharding.{name}", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'shardstream\[s3\]'"):
        open_store("s3://bucket/prefix")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("a.tar", ("/base", "a.tar")),  # relative: beside the manifest
        ("/x/y/a.tar", ("/x/y", "a.tar")),
        ("/a.tar", ("/", "a.tar")),
        ("file:///x/a.tar", ("/x", "a.tar")),
        ("s3://bucket/x/a.tar", ("s3://bucket/x", "a.tar")),
        ("s3://bucket/a.tar", ("s3://bucket", "a.tar")),
        ("", None),
        ("/x/", None),
        ("..", None),
        ("/x/..", None),
    ],
)
def test_locate(url: str, place: tuple[str, str] | None) -> None:
    """A shard's URL leads to its folder's store and its name there, or is bad data."""
    base = LocalStore(Path("/base"))
    if place is None:
        with pytest.raises(DataError, match=f"^'{url}' is no name of a shard"):
            locate(base, url)
    else:
        store, name = locate(base, url)
        assert (store.url, name) == place
