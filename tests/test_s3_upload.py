"""Uploads to S3: an object appears whole and right, or nothing of it stays."""

import socket
import time
from dataclasses import replace

import pytest

import sharding.s3_upload
from sharding.retry import GaveUpError
from sharding.s3 import S3Store
from sharding.s3_upload import MIB, part_bytes
from tests.fault_proxy import BUCKET, Fault, FaultProxy, s3_endpoint
from tests.s3_stores import BYTES, HURRIED, client, put, store_with_bytes


@pytest.fixture
def store(proxy: FaultProxy, folder: str) -> S3Store:
    """A store behind the proxy that holds BYTES as `a`."""
    return store_with_bytes(proxy, folder)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the least size that S3 takes."""
    monkeypatch.setattr(sharding.s3_upload, "part_bytes", lambda number: 5 * MIB)


def pending(store: S3Store) -> list[str]:
    """Keys of uploads that wait for their end."""
    listed = client().list_multipart_uploads(Bucket=BUCKET, Prefix=store.key(""))
    return [upload["Key"] for upload in listed.get("Uploads", [])]


def test_parts_suffice_for_the_largest_object() -> None:
    """10,000 parts hold 5 TiB, each within S3's limits; the first thousand are equal."""
    sizes = [part_bytes(number) for number in range(1, 10_001)]
    assert sum(sizes) >= 5 << 40
    assert set(sizes[:1000]) == {16 * MIB}
    assert max(sizes) <= 5 << 30


@pytest.mark.parametrize("size", [0, 5 * MIB, 5 * MIB + 1, 10 * MIB, 11 * MIB])
@pytest.mark.usefixtures("small_parts")
def test_objects_of_some_parts(store: S3Store, size: int) -> None:
    """Objects around the size of a part arrive whole; those of one part in one request."""
    data = (BYTES * 60)[:size]
    before = store.counts.requests
    with store.create("b") as stream:
        for first in range(0, size, 700_000):
            stream.write(data[first : first + 700_000])
        assert "b" not in store.sizes()
    assert store.counts.requests - before == (2 if size <= 5 * MIB else 3 + -(-size // (5 * MIB)))
    assert store.read("b") == data
    assert pending(store) == []


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_upload_leaves_nothing(store: S3Store) -> None:
    """Neither object nor pending parts stay of a block that failed."""

    def fail() -> None:
        with store.create("b") as stream:
            stream.write(bytes(11 * MIB))
            assert pending(store) == [store.key("b")]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert pending(store) == []
    assert list(store.sizes()) == ["a"]


@pytest.mark.usefixtures("small_parts")
def test_an_upload_that_is_refused_leaves_nothing(proxy: FaultProxy, store: S3Store) -> None:
    """Where the service refuses a part in the middle, its error is the user's."""
    proxy.method = "PUT"
    proxy.plan([Fault(kind="status"), Fault(kind="status", status=403, code="AccessDenied")])
    with pytest.raises(PermissionError, match=f"^cannot write {store.url}/b: 403 AccessDenied"):
        put(store, "b", bytes(6 * MIB))
    assert pending(store) == []


@pytest.mark.usefixtures("small_parts")
def test_uploads_are_tried_again(proxy: FaultProxy, store: S3Store) -> None:
    """Parts meet slow-downs, damage and resets; the object is right and complete."""
    data = (BYTES * 60)[: 11 * MIB]
    proxy.method = "PUT"
    proxy.plan(
        [
            Fault(kind="status"),
            Fault(kind="status", status=400, code="BadDigest"),
            Fault(kind="reset", at=-1),
            Fault(kind="close", at=-1),
            Fault(kind="status", status=500, code="InternalError", forward=True),
        ]
    )
    put(store, "b", data)
    assert sum(seen.method == "PUT" for seen in proxy.seen) == 3 + 5
    assert store.read("b") == data


@pytest.mark.usefixtures("small_parts")
def test_the_end_of_an_upload_is_not_heard(proxy: FaultProxy, store: S3Store) -> None:
    """Where the answer to the last request is lost, the object itself tells that it is there."""
    proxy.method = "POST"
    with store.create("b") as stream:
        stream.write(bytes(11 * MIB))
        proxy.plan([Fault(kind="status", status=500, code="InternalError", forward=True)])
    assert store.sizes()["b"] == 11 * MIB
    assert pending(store) == []


def test_sweep(store: S3Store) -> None:
    """What killed writers left here is removed; what lies deeper is not ours."""
    for name in ("b", "b", "c", "deeper/d"):
        client().create_multipart_upload(Bucket=BUCKET, Key=store.key(name))
    store.sweep(lambda name: name == "c")
    assert sorted(pending(store)) == [store.key(name) for name in ("b", "b", "deeper/d")]
    store.sweep()
    assert pending(store) == [store.key("deeper/d")]
    S3Store(f"{store.url}/deeper", endpoint=s3_endpoint()).sweep()
    assert pending(store) == []


def test_a_service_that_takes_nothing(folder: str) -> None:
    """An upload to a service that accepts connections and reads nothing ends in time."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        store = S3Store(folder, endpoint=endpoint, policy=replace(HURRIED, requests=2))
        began = time.monotonic()
        with pytest.raises(GaveUpError, match="no success in 2 requests"):
            put(store, "b", bytes(8 * MIB))
        assert time.monotonic() - began < 8


def test_a_body_taken_too_slowly() -> None:
    """A body breaks its request off once its time is over."""
    late = iter([False, True])
    body = sharding.s3_upload._Body(b"12", lambda: next(late))
    assert body.read(1) == b"1"
    with pytest.raises(TimeoutError, match="too slowly"):
        body.read(1)
