"""S3: right bytes or the right error within the limits, whatever happens on the wire."""

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal
from uuid import uuid4

import pytest

from loaders.reader import ShardReader
from sharding.dataset import PackedSplit, open_splits
from sharding.errors import DataError, UsageError
from sharding.process import FORK
from sharding.retry import Clock, GaveUpError
from sharding.s3 import S3Store
from sharding.store import open_store
from tests.fault_proxy import BUCKET, Fault, FaultProxy, s3_endpoint
from tests.make_shards import SAMPLES, data_set, open_shards
from tests.s3_stores import BUDGET_S, BYTES, HURRIED, IMPATIENT, POLICY, put, store_with_bytes

FIRST, SIZE = 50_000, 120_000  # of ranged reads
AT = 70_000  # bytes that pass before a fault


@pytest.fixture
def store(proxy: FaultProxy, folder: str) -> S3Store:
    """A store behind the proxy that holds BYTES as `a`."""
    return store_with_bytes(proxy, folder)


def reader_of(store: S3Store, how: str) -> tuple[Callable[[], bytes], bytes, int]:
    """A read of `a` in one way or the other, what it should bring, and its first byte."""
    if how == "whole":
        return lambda: store.read("a"), BYTES, 0
    blob = store.open("a")
    return lambda: blob.read_at(FIRST, SIZE), BYTES[FIRST : FIRST + SIZE], FIRST


def ranges(proxy: FaultProxy) -> list[str]:
    """The ranges of the GETs that came by."""
    return [seen.range for seen in proxy.seen if seen.method == "GET"]


# ----- The matrix: {reset, close, stall, trickle, flip, 503 x 20, 412, 403} x {whole, ranged}


@pytest.mark.parametrize("how", ["whole", "ranged"])
@pytest.mark.parametrize("kind", ["reset", "close", "stall", "trickle"])
def test_a_broken_answer_is_read_on(
    proxy: FaultProxy, folder: str, store: S3Store, kind: Literal["reset"], how: str
) -> None:
    """Two breaks are two requests more, on fresh connections, from the byte that was reached."""
    store = S3Store(folder, endpoint=proxy.url, policy=HURRIED)
    read, expected, first = reader_of(store, how)
    proxy.plan([Fault(kind=kind, at=AT), Fault(kind=kind, at=AT // 2)])
    retries, began = store.counts.retries, time.monotonic()
    assert read() == expected
    assert time.monotonic() - began < 2 * BUDGET_S + 1
    assert store.counts.retries - retries == 2
    assert len({seen.port for seen in proxy.seen}) == 3
    asked = [int(r.partition("=")[2].partition("-")[0]) for r in ranges(proxy) if r]
    if how == "whole":
        asked.insert(0, 0)
    assert asked[0] == first
    slack = 0 if kind in {"close", "stall"} else AT  # a reset loses bytes, a trickle adds some
    assert abs(asked[1] - (first + AT)) <= slack
    assert abs(asked[2] - (asked[1] + AT // 2)) <= slack
    assert asked == sorted(asked)


@pytest.mark.parametrize("how", ["whole", "ranged"])
@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("reset", -1),
        ("reset", 0),
        ("close", -1),
        ("close", 0),
        ("stall", -1),
        ("stall", 0),
        ("trickle", 0),
        ("status", 0),
    ],
)
def test_a_fault_that_stays_is_an_error(
    proxy: FaultProxy, folder: str, store: S3Store, kind: Literal["reset"], at: int, how: str
) -> None:
    """A service that never gets well is given up after the allowed requests, in time."""
    impatient = S3Store(folder, endpoint=proxy.url, policy=IMPATIENT)
    read, _, first = reader_of(impatient, how)
    proxy.plan([Fault(kind=kind, at=at)] * 99)
    began = time.monotonic()
    part = f"bytes {first}-{first + SIZE - 1} of " if first else ""
    with pytest.raises(
        GaveUpError, match=f"^cannot read {part}{folder}/a: no success in 3 requests over"
    ):
        read()
    assert time.monotonic() - began < 3 * BUDGET_S + 1
    assert len(ranges(proxy)) == 3


@pytest.mark.parametrize("how", ["whole", "ranged"])
def test_slow_down_twenty_times(proxy: FaultProxy, store: S3Store, how: str) -> None:
    """20 answers of 503 SlowDown are 20 requests more; then come the bytes."""
    read, expected, _ = reader_of(store, how)
    proxy.plan([Fault(kind="status")] * 20)
    assert read() == expected
    assert len(ranges(proxy)) == 21


def test_a_flipped_byte_of_a_whole_read(proxy: FaultProxy, store: S3Store) -> None:
    """A whole body that its ETag does not fit is read again."""
    proxy.plan([Fault(kind="flip", at=AT)])
    assert store.read("a") == BYTES
    assert len(proxy.seen) == 2


def test_a_flipped_byte_of_a_ranged_read(proxy: FaultProxy, store: S3Store) -> None:
    """S3 tells nothing by which a range could be checked: who reads has to (see below)."""
    blob = store.open("a")
    proxy.plan([Fault(kind="flip", at=AT)])
    got, expected = blob.read_at(FIRST, SIZE), BYTES[FIRST : FIRST + SIZE]
    assert [i for i in range(SIZE) if got[i] != expected[i]] == [AT]
    assert len(proxy.seen) == 1


@pytest.mark.parametrize("how", ["whole", "ranged"])
@pytest.mark.parametrize(
    ("status", "code", "error", "text"),
    [
        (412, "PreconditionFailed", DataError, "the object was changed after it was opened"),
        (403, "AccessDenied", PermissionError, "the credentials do not allow it or"),
        (403, "RequestTimeTooSkewed", UsageError, "this machine's clock is wrong: set it"),
        (403, "SignatureDoesNotMatch", UsageError, "see the credentials, their expiry"),
        (403, "InvalidAccessKeyId", UsageError, "see the credentials, their expiry"),
        (400, "ExpiredToken", UsageError, "see the credentials, their expiry"),
        (404, "NoSuchBucket", UsageError, "there is no such bucket: make it"),
        (404, "NoSuchKey", FileNotFoundError, "there is no such object"),
        (400, "InvalidArgument", UsageError, "the service refuses such a request"),
        (501, "NotImplemented", UsageError, "the service refuses such a request"),
    ],
)
def test_what_will_not_pass_fails_at_once(
    proxy: FaultProxy,
    store: S3Store,
    how: str,
    status: int,
    code: str,
    error: type[Exception],
    text: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One request, and one line that names object, range, request and cause, but no credentials."""
    read, _, first = reader_of(store, how)
    proxy.plan([Fault(kind="status", status=status, code=code)])
    place = f"bytes {first}-{first + SIZE - 1} of {store.url}/a" if first else f"{store.url}/a"
    with caplog.at_level(logging.INFO), pytest.raises(error) as caught:
        read()
    message = str(caught.value)
    assert message.startswith(f"cannot read {place}: {status} {code} (request 1); {text}")
    for secret in ("testing", os.environ["AWS_SECRET_ACCESS_KEY"]):  # the server said the first
        assert secret not in message + caplog.text
    assert len(proxy.seen) == 1


# ----- Reads


def test_an_object_that_changed_is_refused(store: S3Store) -> None:
    """A blob reads the object that was opened or none: If-Match pins it."""
    blob = store.open("a")
    put(store, "a", bytes(len(BYTES)))
    with pytest.raises(DataError, match=r"412 PreconditionFailed .* the object was changed"):
        blob.read_at(0, 10)


def test_a_known_size_saves_a_request(proxy: FaultProxy, store: S3Store) -> None:
    """Nothing is asked to open it; the first read's ETag pins those that follow."""
    blob = store.open("a", len(BYTES))
    assert not ranges(proxy)
    assert "HEAD" not in {seen.method for seen in proxy.seen}
    assert blob.read_at(FIRST, SIZE) == BYTES[FIRST : FIRST + SIZE]
    put(store, "a", bytes(len(BYTES)))
    with pytest.raises(DataError, match=r"412 PreconditionFailed .* the object was changed"):
        blob.read_at(0, 10)


@pytest.mark.parametrize("size", [len(BYTES) - 1, len(BYTES) + 1])
def test_a_size_that_is_not_the_objects(store: S3Store, size: int) -> None:
    """Found at the first read, wherever that is."""
    blob = store.open("a", size)
    with pytest.raises(DataError, match=f"/a has {len(BYTES)} bytes, not {size}: it was changed"):
        blob.read_at(size - 10, 10)


def test_an_object_that_is_not_there_is_missed_when_it_is_read(store: S3Store) -> None:
    """As with one whose size was asked for, only later."""
    blob = store.open("b", 10)
    with pytest.raises(FileNotFoundError, match="there is no such object"):
        blob.read_at(0, 10)


def test_two_first_reads_of_two_objects_are_noticed(store: S3Store) -> None:
    """Both began before an ETag was known, and the object was changed between them."""
    blob = store.open("a", len(BYTES))
    s3 = store.service.connection.client
    get = s3.get_object

    def get_and_change(**request: Any) -> Any:
        answer = get(**request)
        s3.get_object = get  # type: ignore[method-assign]
        put(store, "a", bytes(len(BYTES)))
        assert blob.read_at(0, 10) == bytes(10)
        return answer

    s3.get_object = get_and_change  # type: ignore[method-assign]
    with pytest.raises(DataError, match="/a was changed after it was opened"):
        blob.read_at(0, 10)


def test_an_object_that_changes_between_two_tries(proxy: FaultProxy, store: S3Store) -> None:
    """A whole read that breaks off goes on in the same object or not at all."""
    clock = Clock(sleep=lambda _: put(store, "a", bytes(len(BYTES))))
    other = S3Store(store.url, endpoint=proxy.url, policy=POLICY, clock=clock)
    proxy.plan([Fault(kind="close", at=AT)])
    with pytest.raises(DataError, match=r"412 PreconditionFailed \(request 2\); the object was"):
        other.read("a")


def test_a_service_that_ignores_ranges(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole object instead of a range is no range."""
    blob = store.open("a")
    s3 = store.service.connection.client
    monkeypatch.setattr(
        s3, "get_object", lambda get=s3.get_object, **r: get(Bucket=r["Bucket"], Key=r["Key"])
    )
    with pytest.raises(DataError, match="bytes 1-9 were asked for, the answer has no range"):
        blob.read_at(1, 9)


def test_many_threads_meet_faults(proxy: FaultProxy, store: S3Store) -> None:
    """16 threads read through one client; each fault costs one request, and no byte is wrong."""
    blob = store.open("a")
    proxy.plan([Fault(kind="close", at=10), Fault(kind="reset", at=10), Fault(kind="status")] * 5)
    before = store.counts.requests
    firsts = range(0, len(BYTES), 5000)
    with ThreadPoolExecutor(16) as pool:
        assert b"".join(pool.map(lambda first: blob.read_at(first, 5000), firsts)) == BYTES
    assert store.counts.requests - before == len(firsts) + 15 == len(proxy.seen)


def test_counts(store: S3Store) -> None:
    """Requests and bytes are counted, for all stores that are set up alike."""
    before = replace(store.counts)
    other = S3Store(store.url + "/deeper", endpoint=store.service.endpoint, policy=POLICY)
    assert other.counts is store.counts
    put(other, "b", BYTES)
    other.open("b").read_at(0, 100)
    other.read("b")
    now = store.counts
    assert now.requests - before.requests == 4
    assert now.bytes_read - before.bytes_read == 100 + len(BYTES)
    assert now.bytes_written - before.bytes_written == len(BYTES)


# ----- Listings


def test_long_listings_come_in_pages(proxy: FaultProxy, store: S3Store) -> None:
    """All pages are read, and a page that fails is asked for again."""
    for name in "bcdefg":
        put(store, name, b"1")
    small = S3Store(store.url, endpoint=proxy.url, policy=replace(POLICY, budget_s=9))
    small.service.connection.client.meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=3)
    )
    proxy.plan([Fault(kind="close", at=100), Fault(kind="status")])
    assert small.sizes() == {"a": len(BYTES)} | dict.fromkeys("bcdefg", 1)
    assert len(proxy.seen) == 3 + 2


def test_a_listing_that_does_not_go_on(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that says there is more but not where is an error, not a short or endless listing."""
    for page in ({"IsTruncated": True}, {"IsTruncated": True, "NextContinuationToken": "x"}):
        monkeypatch.setattr(store, "_list", lambda token, page=page: page)
        with pytest.raises(DataError, match="does not say how it goes on"):
            store.sizes()


# ----- Settings


@pytest.mark.parametrize(
    ("url", "prefix"), [("s3://b", ""), ("s3://b/", ""), ("s3://b/p/q", "p/q"), ("s3://b/p//", "p")]
)
def test_urls(url: str, prefix: str) -> None:
    """A URL's slashes at its end do not matter."""
    store = S3Store(url, environ={})
    assert (store.bucket, store.key("a")) == ("b", f"{prefix}/a".lstrip("/"))
    assert store.url == f"s3://b/{prefix}".rstrip("/")


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "http://bucket/p"])
def test_urls_that_are_none(url: str) -> None:
    """A URL without a bucket is refused."""
    with pytest.raises(UsageError, match=f"cannot open '{url}': it is not like s3://bucket/prefix"):
        S3Store(url)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (None, None)),
        (
            {"AWS_ENDPOINT_URL": "http://h:1", "AWS_REGION": "eu-west-1"},
            ("http://h:1", "eu-west-1"),
        ),
        (
            {"AWS_ENDPOINT_URL": "http://h:1", "AWS_ENDPOINT_URL_S3": "http://s:2"},
            ("http://s:2", None),
        ),
        ({"AWS_DEFAULT_REGION": "r", "AWS_ENDPOINT_URL": ""}, (None, "r")),
    ],
)
def test_environment(environ: dict[str, str], expected: tuple[str | None, str | None]) -> None:
    """Endpoint and region come from AWS's variables, and travel with the store."""
    service = pickle.loads(pickle.dumps(S3Store("s3://b", environ=environ))).service
    assert (service.endpoint, service.region) == expected


# ----- Packed data on S3


@pytest.fixture(scope="module")
def shards() -> str:
    """URL of the common data set on S3."""
    url = f"s3://{BUCKET}/{uuid4().hex}"
    for split in ("train", "val"):
        store = S3Store(f"{url}/{split}", endpoint=s3_endpoint())
        for path in (data_set() / "shards" / split).iterdir():
            if not path.name.startswith("."):
                put(store, path.name, path.read_bytes())
    return url


@pytest.fixture
def reader(shards: str, monkeypatch: pytest.MonkeyPatch) -> ShardReader:
    """Reader of the training split on S3, opened by its URL alone."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    return open_shards(shards)  # type: ignore[arg-type]


def read_all(reader: ShardReader) -> list[bytes]:
    """Every sample."""
    return [reader.read(number) for number in range(SAMPLES["train"])]


def test_packed_data(reader: ShardReader, shards: str) -> None:
    """Shards on S3 give the bytes that they give on disk, and are the same data set."""
    assert read_all(reader) == read_all(open_shards())
    assert reader.digest == open_shards().digest
    assert list(open_splits(shards)) == ["train", "val"]
    PackedSplit.open(f"{shards}/val").check_present()
    with pytest.raises(DataError, match=f"^{shards}/none has no manifest.json"):
        PackedSplit.open(f"{shards}/none")


def test_packed_data_in_a_new_process(reader: ShardReader) -> None:
    """A reader is pickled to a spawned process after its use."""
    expected = reader.read(5)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(reader.read, 5).result() == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the proxy
def test_packed_data_after_a_fork(reader: ShardReader) -> None:
    """A forked process makes its own client; both go on reading, with open blobs."""
    blob = open_store(reader.split.store.url).open("train-000000.tar")
    head = blob.read_at(0, 512)
    used = reader.split.store.counts  # type: ignore[attr-defined]

    def child() -> None:
        before = reader.split.store.counts.requests  # type: ignore[attr-defined]
        same = blob.read_at(0, 512) == head and read_all(reader) == read_all(open_shards())
        os._exit(0 if same and before == 0 else 1)

    before = used.requests
    process = FORK.Process(target=child)  # type: ignore[attr-defined]
    process.start()
    assert read_all(reader) == read_all(open_shards())
    process.join()
    assert process.exitcode == 0
    assert used.requests > before


def test_flipped_bytes_of_samples(proxy: FaultProxy, shards: str) -> None:
    """A sample that arrives damaged is read once more; damaged twice it is a DataError."""
    store = S3Store(f"{shards}/train", endpoint=proxy.url, policy=POLICY)
    split = PackedSplit.open(str(data_set() / "shards" / "train"))
    reader = ShardReader(replace(split, store=store))
    expected = reader.read(3)
    proxy.method = "GET"
    proxy.plan([Fault(kind="flip", at=7)])
    assert reader.read(3) == expected
    assert len(proxy.seen) == 2
    proxy.plan([Fault(kind="flip", at=7)] * 2)
    with pytest.raises(DataError, match=f"^{store.url}/train-000000.tar, offset .* were changed"):
        reader.read(3)
    assert len(proxy.seen) == 2
