"""Store.duplicate: a second name, on a file system and on S3."""

import os
from pathlib import Path

import pytest

from sharding import s3
from sharding import store as stores
from sharding.s3 import S3Store
from sharding.store import LocalStore, Store
from tests.fault_proxy import BUCKET, Fault, FaultProxy, s3_endpoint
from tests.s3_stores import BYTES, HURRIED, put


@pytest.mark.parametrize("way", ["its own", "bytes"])
def test_the_second_name_stays_what_the_first_one_was(
    store: Store, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first one is replaced or removed; nothing else is left behind."""
    if way == "bytes":
        monkeypatch.setattr(s3, "_MOST_AT_ONCE", 10)
        monkeypatch.setattr(stores, "_PIECE", 70_000)
        monkeypatch.setattr(os, "link", no_links)
    put(store, "first", BYTES)
    put(store, "second", b"old")
    store.duplicate("first", "second")
    store.duplicate("first", "third")
    put(store, "first", b"new")
    assert store.read("second") == store.read("third") == BYTES
    store.delete("first")
    assert store.sizes() == {"second": len(BYTES), "third": len(BYTES)}
    if isinstance(store, LocalStore):
        assert len(list(store.root.iterdir())) == 2


def no_links(source: Path, target: Path) -> None:
    """As some file systems answer."""
    raise PermissionError(1, "Operation not permitted", str(source))


@pytest.mark.parametrize("fault", ["unknown", "slow"])
def test_a_service_that_cannot_copy_in_time(tmp_path: Path, fault: str) -> None:
    """Its bytes go through here."""
    broken = {
        "unknown": Fault(kind="status", status=501, code="NotImplemented"),
        "slow": Fault(kind="stall", at=-1),
    }[fault]
    with FaultProxy(s3_endpoint(), method="PUT") as proxy:
        store = S3Store(f"s3://{BUCKET}/{tmp_path.name}", endpoint=proxy.url, policy=HURRIED)
        put(store, "first", BYTES)
        proxy.plan([broken])
        before = store.counts.bytes_written
        store.duplicate("first", "second")
        assert store.counts.bytes_written == before + len(BYTES)
        assert store.read("second") == BYTES


def test_of_nothing_there_is_no_second(store: Store) -> None:
    """The one before stays."""
    put(store, "second", b"old")
    with pytest.raises(FileNotFoundError):
        store.duplicate("first", "second")
    assert store.read("second") == b"old"


def test_on_s3_no_byte_passes_here(tmp_path: Path) -> None:
    """The service copies."""
    store = S3Store(f"s3://{BUCKET}/{tmp_path.name}", endpoint=s3_endpoint())
    put(store, "first", BYTES)
    before = store.counts.bytes_read, store.counts.bytes_written
    store.duplicate("first", "second")
    assert (store.counts.bytes_read, store.counts.bytes_written) == before
    assert store.read("second") == BYTES
