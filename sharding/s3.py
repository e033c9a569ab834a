"""Shards on S3 and on what speaks its language: the one place that imports boto3.

boto3 signs, finds credentials and keeps connections. Trying again is ours (see retry.py): boto3
does not notice an answer that breaks off, stalls or trickles in the middle of its body.
"""

import base64
import hashlib
import http.client
import io
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as boto_errors
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from sharding.errors import DataError, UsageError
from sharding.retry import Clock, Counts, GaveUpError, PassingError, RetryPolicy, persist
from sharding.store import Blob

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        GetObjectOutputTypeDef,
        GetObjectRequestTypeDef,
        ListObjectsV2OutputTypeDef,
        ListObjectsV2RequestTypeDef,
    )

T = TypeVar("T")

MIB = 1 << 20
_PIECE = 256 << 10  # of a body, read at once
_CONNECTIONS = 64  # kept open by a process; more threads than that open their own
_MD5 = re.compile(r'"[0-9a-f]{32}"')


# ----- what the wire and the service answer, and what it means


class _RefusedError(Exception):
    """Raised for an answer that trying again will not better."""


_PASSING = (
    boto_errors.HTTPClientError,
    boto_errors.ConnectionError,
    boto_errors.CredentialRetrievalError,  # the machine's own service for them, overloaded
    ResponseParserError,  # an answer cut short
    HTTPError,
    OSError,
    EOFError,
)
# What a request can raise that is no bug of ours.
_WIRE = (*_PASSING, boto_errors.BotoCoreError, boto_errors.ClientError, _RefusedError)
# Beside 429 and 500 and above. Of the digests: the bytes were damaged on their way.
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestThrottled",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_CREDENTIALS = (UsageError, "see the credentials, their expiry and the region")
_CHANGED = (
    DataError,
    "the object was changed after it was opened: let nobody write to it, and start again",
)
_NOT_ALLOWED = (
    PermissionError,
    "the credentials do not allow it or, where they may not list, there is no such object",
)
_VERDICTS: dict[str | int, tuple[type[Exception], str]] = {
    "AuthorizationHeaderMalformed": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "RequestTimeTooSkewed": (UsageError, "this machine's clock is wrong: set it"),
    "NoSuchBucket": (UsageError, "there is no such bucket: make it, or correct the URL"),
    "NoSuchUpload": (GaveUpError, "somebody ended the upload: start the same command again"),
    403: _NOT_ALLOWED,
    404: (FileNotFoundError, "there is no such object"),
    412: _CHANGED,
    416: _CHANGED,
}


@contextmanager
def _explained(what: str, number: int) -> Iterator[None]:
    """Turn what boto3 and the wire raise into PassingError, or into the error that users meet."""
    try:
        yield
    except _WIRE as error:
        cause = _cause(error)
        if _passes(error):
            raise PassingError(cause) from error
        kind, advice = _verdict(error)
        raise kind(f"{what}: {cause} (request {number}); {advice}") from error


def _code(error: Exception) -> tuple[str, int]:
    """S3's name of an error and the HTTP status, "" and 0 where there was no answer."""
    if not isinstance(error, boto_errors.ClientError):
        return "", 0
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return error.response.get("Error", {}).get("Code", ""), status


def _cause(error: Exception) -> str:
    """What happened, without what the service wrote: it may repeat what must not be shown."""
    code, status = _code(error)
    if status:
        return f"{status} {code if code != str(status) else http.client.responses.get(status, '')}"
    if isinstance(error, (EOFError, TimeoutError, _RefusedError)):
        return str(error)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return f"{type(error).__name__}, {link.strerror}"
        link = link.__cause__ or link.__context__
    return type(error).__name__


def _passes(error: Exception) -> bool:
    code, status = _code(error)
    if status:
        return status == 429 or (status >= 500 and status != 501) or code in _PASSING_CODES
    if isinstance(error, boto_errors.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    return isinstance(error, _PASSING)


def _verdict(error: Exception) -> tuple[type[Exception], str]:
    code, status = _code(error)
    if isinstance(error, _RefusedError):
        return DataError, "the service, or a proxy before it, does not serve ranges"
    if not status:
        return UsageError, "see the URL, and the settings of AWS (AWS_PROFILE, credentials, region)"
    other = (UsageError, "the service refuses such a request")
    return _VERDICTS.get(code) or _VERDICTS.get(status) or other


# ----- the way to the service


@dataclass(frozen=True, kw_only=True)
class Service:
    """Where requests go, and how long they may take.

    Credentials are no part of it: boto3 finds them, in each process anew.
    """

    endpoint: str | None = None
    """http(s)://host:port; None: what AWS's configuration says."""
    region: str | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        if self.endpoint is None:
            return
        parts = urlsplit(self.endpoint)
        if parts.username or parts.password:
            raise UsageError("the S3 endpoint holds a user or a password; use AWS_PROFILE instead")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"the S3 endpoint {self.endpoint!r} is not like https://host:port")


class _Connection:
    """A process's own client of a service, made at its first use, and what was asked through it."""

    def __init__(self, service: Service) -> None:
        self.counts = Counts()
        self._service = service
        self._lock = threading.Lock()
        self._client: S3Client | None = None

    @property
    def client(self) -> "S3Client":
        with self._lock:
            if self._client is None:
                self._client = self._make()
        return self._client

    def _make(self) -> "S3Client":
        policy = self._service.policy
        config = Config(
            connect_timeout=policy.connect_s,
            read_timeout=policy.stall_s,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=_CONNECTIONS,
            tcp_keepalive=True,
            # By default botocore appends checksums in a form that only AWS takes.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return boto3.session.Session(region_name=self._service.region).client(
            "s3", endpoint_url=self._service.endpoint, config=config
        )


# By process as well, since a socket must not be used on both sides of a fork. A parent's entries
# stay in the child: to collect them could wait for a lock that a thread held when it was forked.
_connections: dict[tuple[int, Service], _Connection] = {}


# ----- the store


class S3Store:
    """The objects directly below a prefix of a bucket.

    Endpoint and region come from AWS_ENDPOINT_URL and AWS_REGION or the other usual places of AWS,
    as do profile and credentials. A store can be pickled and used after a fork. No method leaves
    the policy's limits; then, and where a request is refused, the error names object, range, number
    of requests and last cause: DataError for bad data, UsageError, PermissionError, GaveUpError.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        policy: RetryPolicy | None = None,
        clock: Clock | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        scheme, _, place = url.partition("://")
        self.bucket, _, prefix = place.partition("/")
        if scheme != "s3" or not self.bucket:
            raise UsageError(f"cannot open {url!r}: it is not like s3://bucket/prefix")
        self._prefix = prefix.strip("/")
        self.url = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        endpoint = endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
        region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
        self.policy = policy or RetryPolicy()
        self._service = Service(
            endpoint=endpoint or None, region=region or None, policy=self.policy
        )
        self.clock = clock or Clock()

    @property
    def counts(self) -> Counts:
        """What this process has asked of the service, through all stores that are set up alike."""
        return self._connection.counts

    def sizes(self) -> dict[str, int]:
        """See Store."""
        found: dict[str, int] = {}
        token = ""
        while True:
            page = self._list(token)
            for entry in page.get("Contents", []):
                name = entry["Key"].removeprefix(self.key(""))
                if name and not name.startswith("."):
                    found[name] = entry["Size"]
            if not page.get("IsTruncated"):
                return found
            last, token = token, page.get("NextContinuationToken", "")
            if token in {"", last}:
                raise DataError(f"cannot list {self.url}: the service does not say how it goes on")

    def read(self, name: str) -> bytes:
        """See Store. A body that differs from its ETag's MD5 is read once more."""
        fetch = _Fetch(self, name)
        data = fetch.run()
        if fetch.md5 not in {"", hashlib.md5(data, usedforsecurity=False).hexdigest()}:
            data = _Fetch(self, name).run()
        return data

    def open(self, name: str) -> Blob:
        """See Store."""
        key = self.key(name)
        head = self.ask(
            f"open {self.url}/{name}", lambda s3: s3.head_object(Bucket=self.bucket, Key=key)
        )
        return S3Blob(self, name, size=head["ContentLength"], etag=head["ETag"])

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """See Store. Large objects go up in parts while they are written.

        The last writer wins, as with LocalStore: `If-None-Match` is not asked for, since not all
        services know it. Where a service does not answer the last request of all tries, nobody can
        know whether the object is there.
        """
        return _created(self, name)

    def delete(self, name: str) -> None:
        """See Store."""
        key = self.key(name)
        with suppress(FileNotFoundError):
            self.ask(
                f"delete {self.url}/{name}",
                lambda s3: s3.delete_object(Bucket=self.bucket, Key=key),
            )

    def sweep(self) -> None:
        """Remove what killed writers left half-written. Only while nobody writes here."""
        what = f"sweep {self.url}"
        while True:
            page = self.ask(
                what,
                lambda s3: s3.list_multipart_uploads(Bucket=self.bucket, Prefix=self.key("")),
            )
            ours = [
                (upload["Key"], upload["UploadId"])
                for upload in page.get("Uploads", [])
                if "/" not in upload["Key"].removeprefix(self.key(""))
            ]
            for key, upload_id in ours:
                abort(self, what, key, upload_id)
            if not (page.get("IsTruncated") and ours):
                return

    def key(self, name: str) -> str:
        """An object's key in the bucket; of "", what all keys here begin with."""
        return f"{self._prefix}/{name}" if self._prefix else name

    def ask(
        self, what: str, request: Callable[["S3Client"], T], *, size: int = 0, quick: bool = False
    ) -> T:
        """Make a request until it succeeds. `what` is to be read after "cannot".

        size: the bytes that it moves; quick: only a few tries, as nothing depends on it.
        """
        policy = replace(self.policy, budget_s=self.policy.stall_s, requests=3)
        what = f"cannot {what}"

        def attempt(number: int) -> T:
            with _explained(what, number):
                return request(self._connection.client)

        return persist(
            attempt,
            what=what,
            size=size,
            policy=policy if quick else self.policy,
            clock=self.clock,
            counts=self.counts,
        )

    def _list(self, token: str) -> "ListObjectsV2OutputTypeDef":
        request: ListObjectsV2RequestTypeDef = {
            "Bucket": self.bucket,
            "Prefix": self.key(""),
            "Delimiter": "/",
        }
        if token:
            request["ContinuationToken"] = token
        return self.ask(f"list {self.url}", lambda s3: s3.list_objects_v2(**request))

    @property
    def _connection(self) -> _Connection:
        place = (os.getpid(), self._service)
        return _connections.get(place) or _connections.setdefault(place, _Connection(place[1]))


# ----- reading


class S3Blob:
    """An object as it was when it was opened."""

    def __init__(self, store: S3Store, name: str, *, size: int, etag: str) -> None:
        self._store = store
        self._name = name
        self._etag = etag
        self.size = size

    def read_at(self, offset: int, size: int) -> bytes:
        """See Blob. Raises DataError as well where the object is not the one that was opened."""
        if offset + size > self.size and size:
            raise DataError(
                f"{self._store.url}/{self._name} ends at byte {self.size}, {size} bytes are needed "
                f"from {offset}: the object was truncated"
            )
        return _Fetch(self._store, self._name, offset, offset + size, self._etag).run()


class _Fetch:
    """One read: what has come of it so far, and what is still to come."""

    def __init__(
        self, store: S3Store, name: str, first: int = 0, stop: int | None = None, etag: str = ""
    ) -> None:
        """stop: None for the whole object, whose size and ETag the first answer tells."""
        self._store = store
        self._request: GetObjectRequestTypeDef = {"Bucket": store.bucket, "Key": store.key(name)}
        self._next = first
        self._stop = stop
        self._etag = etag
        self._pieces: list[bytes] = []
        part = "" if stop is None else f"bytes {first}-{stop - 1} of "
        self._what = f"read {part}{store.url}/{name}"
        self.md5 = ""
        """What the whole object's MD5 should be, where the service tells."""

    def run(self) -> bytes:
        if self._next != self._stop:
            size = 0 if self._stop is None else self._stop - self._next
            self._store.ask(self._what, self._go_on, size=size)
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def _go_on(self, s3: "S3Client") -> None:
        began = self._store.clock.now()
        if self._stop is not None:
            self._request["IfMatch"] = self._etag
            self._request["Range"] = f"bytes={self._next}-{self._stop - 1}"
        answer = s3.get_object(**self._request)
        with answer["Body"] as body:  # left early, the connection is closed and not used again
            if self._stop is None:
                self._begin(answer)
            elif not answer.get("ContentRange", "").startswith(
                f"bytes {self._next}-{self._stop - 1}/"
            ):
                raise _RefusedError(
                    f"bytes {self._next}-{self._stop - 1} were asked for, the answer has "
                    f"{answer.get('ContentRange') or 'no range'}"
                )
            assert self._stop is not None
            deadline = began + self._store.policy.seconds_for(self._stop - self._next)
            self._receive(body, deadline)

    def _begin(self, answer: "GetObjectOutputTypeDef") -> None:
        self._stop = answer["ContentLength"]
        self._etag = answer["ETag"]
        encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256"
        if _MD5.fullmatch(self._etag) and not encrypted and "SSECustomerAlgorithm" not in answer:
            self.md5 = self._etag.strip('"')

    def _receive(self, body: Any, deadline: float) -> None:
        """Take what there is, piece by piece: `read` would wait for all that it is asked for."""
        assert self._stop is not None
        counts = self._store.counts
        while self._next < self._stop:
            piece = body.read1(min(_PIECE, self._stop - self._next))
            if not piece:
                raise EOFError(f"the answer ended {self._stop - self._next} bytes early")
            self._pieces.append(piece)
            self._next += len(piece)
            counts.add(bytes_read=len(piece))
            if self._store.clock.now() > deadline and self._next < self._stop:
                raise TimeoutError("the answer came too slowly")
        body.read()  # nothing is left; this gives the connection back


# ----- writing


def part_bytes(number: int) -> int:
    """Size of part 1, 2, ... of an upload: 10,000 hold the 5 TiB that an object may have.

    16 MiB each up to 16 GB (some services want equal parts), then growing up to 1.4 GiB.
    """
    return 16 * MIB * (100 + max(0, number - 1000)) // 100


class _Upload(io.RawIOBase):
    """An object on its way up, in parts if it is large.

    Holds one part in memory, and a copy of it while it is sent.
    """

    def __init__(self, store: S3Store, name: str) -> None:
        self._store = store
        self._key = store.key(name)
        self._bucket = store.bucket
        self._what = f"write {store.url}/{name}"
        self._buffer = bytearray()
        self._id = ""
        self._parts: list[CompletedPartTypeDef] = []
        self._abandoned = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self._abandoned:
            self._buffer += data
            while len(self._buffer) > (size := part_bytes(len(self._parts) + 1)):
                self._send_part(size)  # more than it: something is left for the last
        return memoryview(data).nbytes

    def publish(self) -> None:
        """Let the object appear."""
        if not self._parts:
            data = bytes(self._buffer)
            self._send(
                data, lambda s3, **body: s3.put_object(Bucket=self._bucket, Key=self._key, **body)
            )
            return
        self._send_part(len(self._buffer))
        self._store.ask(self._what, self._complete)

    def abandon(self) -> None:
        """Let nothing stay of it, not even where the store went away in the middle."""
        self._abandoned = True
        if self._id:
            with suppress(OSError, UsageError, DataError):  # what led here matters more
                abort(self._store, self._what, self._key, self._id)

    def _send_part(self, size: int) -> None:
        if not self._id:
            self._id = self._store.ask(
                self._what,
                lambda s3: s3.create_multipart_upload(Bucket=self._bucket, Key=self._key),
            )["UploadId"]
        number = len(self._parts) + 1
        answer = self._send(
            bytes(memoryview(self._buffer)[:size]),
            lambda s3, **body: s3.upload_part(
                Bucket=self._bucket, Key=self._key, UploadId=self._id, PartNumber=number, **body
            ),
        )
        self._parts.append({"ETag": answer["ETag"], "PartNumber": number})
        del self._buffer[:size]

    def _send(self, data: bytes, request: Callable[..., T]) -> T:
        store = self._store
        digest = hashlib.md5(data, usedforsecurity=False).digest()

        def send(s3: "S3Client") -> T:
            deadline = store.clock.now() + store.policy.seconds_for(len(data))
            body = _Body(data, lambda: store.clock.now() > deadline)
            return request(s3, Body=body, ContentMD5=base64.b64encode(digest).decode())

        answer = store.ask(self._what, send, size=len(data))
        store.counts.add(bytes_written=len(data))
        return answer

    def _complete(self, s3: "S3Client") -> None:
        try:
            s3.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._id,
                MultipartUpload={"Parts": self._parts},
            )
        except s3.exceptions.NoSuchUpload:
            # Done by an earlier try whose answer was lost? Then the object's ETag is of our parts.
            digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in self._parts)
            etag = f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(self._parts)}"'
            if s3.head_object(Bucket=self._bucket, Key=self._key)["ETag"] != etag:
                raise


class _Body(io.BytesIO):
    """A request's body that fails when it is taken too slowly."""

    def __init__(self, data: bytes, late: Callable[[], bool]) -> None:
        super().__init__(data)
        self._late = late

    def read(self, size: int | None = -1) -> bytes:
        if self._late():
            raise TimeoutError("the upload went too slowly")
        return super().read(size)


@contextmanager
def _created(store: S3Store, name: str) -> Iterator[BinaryIO]:
    upload = _Upload(store, name)
    stream = io.BufferedWriter(upload, buffer_size=MIB)
    try:
        yield stream
        stream.flush()
        upload.publish()
    except BaseException:
        upload.abandon()
        raise
    finally:
        stream.close()


def abort(store: S3Store, what: str, key: str, upload_id: str) -> None:
    """Remove the parts of an upload that does not go on."""
    with suppress(FileNotFoundError):
        store.ask(
            what,
            lambda s3: s3.abort_multipart_upload(Bucket=store.bucket, Key=key, UploadId=upload_id),
            quick=True,
        )
