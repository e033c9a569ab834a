"""Shards on S3 and on what speaks its language: a store whose reads go on where one broke off."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from sharding import s3_upload
from sharding.errors import DataError, UsageError
from sharding.retry import Clock, Counts, GaveUpError, RetryPolicy
from sharding.s3_client import Service
from sharding.s3_errors import CHANGED, RefusedError
from sharding.store import Blob, copy_bytes

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        GetObjectRequestTypeDef,
        ListObjectsV2OutputTypeDef,
        ListObjectsV2RequestTypeDef,
    )

_PIECE = 256 << 10  # of a body, read at once
_MOST_AT_ONCE = 5 << 30  # what S3 copies in one request
_MD5 = re.compile(r'"[0-9a-f]{32}"')


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
        self.service = Service(
            endpoint=endpoint or None,
            region=region or None,
            policy=policy or RetryPolicy(),
            clock=clock or Clock(),
        )

    @property
    def counts(self) -> Counts:
        """What this process has asked of the service, through all stores that are set up alike."""
        return self.service.counts

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

    def open(self, name: str, size: int | None = None) -> Blob:
        """See Store."""
        if size is not None:
            return S3Blob(self, name, size=size)
        key = self.key(name)
        head = self.service.ask(
            f"open {self.url}/{name}", lambda s3: s3.head_object(Bucket=self.bucket, Key=key)
        )
        return S3Blob(self, name, size=head["ContentLength"], etag=head["ETag"])

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """See Store. Large objects go up in parts while they are written.

        The last writer wins, as with LocalStore: `If-None-Match` is not asked for, since not all
        services know it. Where a service does not answer the last request of all tries, nobody can
        know whether the object is there.
        """
        what = f"write {self.url}/{name}"
        return s3_upload.create(self.service, bucket=self.bucket, key=self.key(name), what=what)

    def duplicate(self, source: str, target: str) -> None:
        """See Store. The service copies, if one request may (5 GiB) and takes a few seconds."""
        if self.open(source).size <= _MOST_AT_ONCE:
            with suppress(GaveUpError, UsageError):  # too slow for us, or not known there
                self.service.ask(
                    f"copy {self.url}/{source} to {target}",
                    lambda s3: s3.copy_object(
                        Bucket=self.bucket,
                        Key=self.key(target),
                        CopySource={"Bucket": self.bucket, "Key": self.key(source)},
                    ),
                    quick=True,
                )
                return
        copy_bytes(self, source, target)

    def delete(self, name: str) -> None:
        """See Store."""
        key = self.key(name)
        with suppress(FileNotFoundError):
            self.service.ask(
                f"delete {self.url}/{name}",
                lambda s3: s3.delete_object(Bucket=self.bucket, Key=key),
            )

    def sweep(self, ours: Callable[[str], bool] = lambda name: True) -> None:
        """See Store."""
        what, prefix = f"sweep {self.url}", self.key("")
        s3_upload.sweep(self.service, bucket=self.bucket, prefix=prefix, what=what, ours=ours)

    def key(self, name: str) -> str:
        """An object's key in the bucket; of "", what all keys here begin with."""
        return f"{self._prefix}/{name}" if self._prefix else name

    def _list(self, token: str) -> "ListObjectsV2OutputTypeDef":
        request: ListObjectsV2RequestTypeDef = {
            "Bucket": self.bucket,
            "Prefix": self.key(""),
            "Delimiter": "/",
        }
        if token:
            request["ContinuationToken"] = token
        return self.service.ask(f"list {self.url}", lambda s3: s3.list_objects_v2(**request))


class S3Blob:
    """An object as it was when it was opened or, without its ETag, when it was first read."""

    def __init__(self, store: S3Store, name: str, *, size: int, etag: str = "") -> None:
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
        fetch = _Fetch(
            self._store, self._name, offset, offset + size, etag=self._etag, total=self.size
        )
        data = fetch.run()
        if fetch.etag != (self._etag or fetch.etag):  # of two first reads at once
            raise DataError(f"{self._store.url}/{self._name} {CHANGED}")
        self._etag = fetch.etag
        return data


class _Fetch:
    """One read: what has come of it so far, and what is still to come."""

    def __init__(
        self,
        store: S3Store,
        name: str,
        first: int = 0,
        stop: int | None = None,
        *,
        etag: str = "",
        total: int = 0,
    ) -> None:
        """stop: None for the whole object, whose size the first answer tells.

        etag: "" is that of the first answer. total: what the object of a range has, in bytes.
        """
        self._service = store.service
        self._request: GetObjectRequestTypeDef = {"Bucket": store.bucket, "Key": store.key(name)}
        self._next = first
        self._stop = stop
        self._total = total
        self.etag = etag
        self._name = f"{store.url}/{name}"
        self._pieces: list[bytes] = []
        part = "" if stop is None else f"bytes {first}-{stop - 1} of "
        self._what = f"read {part}{self._name}"
        self.md5 = ""
        """What the whole object's MD5 should be, where the service tells."""

    def run(self) -> bytes:
        if self._next != self._stop:
            size = 0 if self._stop is None else self._stop - self._next
            self._service.ask(self._what, self._go_on, size=size)
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def _go_on(self, s3: "S3Client") -> None:
        began = self._service.clock.now()
        asked = ""
        if self._stop is not None:
            asked = f"bytes {self._next}-{self._stop - 1}"
            if self.etag:
                self._request["IfMatch"] = self.etag
            self._request["Range"] = asked.replace(" ", "=")
        answer = s3.get_object(**self._request)
        with answer["Body"] as body:  # left early, the connection is closed and not used again
            if asked:
                self._check(asked, answer.get("ContentRange", ""))
                self.etag = answer["ETag"]
            else:
                self._begin(answer)
            assert self._stop is not None
            deadline = began + self._service.policy.seconds_for(self._stop - self._next)
            self._receive(body, deadline)

    def _check(self, asked: str, got: str) -> None:
        served, _, total = got.partition("/")
        if self._total and total.isdigit() and int(total) != self._total:
            raise DataError(f"{self._name} has {total} bytes, not {self._total}: it {CHANGED}")
        if served != asked:
            raise RefusedError(f"{asked} were asked for, the answer has {got or 'no range'}")

    def _begin(self, answer: "GetObjectOutputTypeDef") -> None:
        self._stop = answer["ContentLength"]
        self.etag = answer["ETag"]
        encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256"
        if _MD5.fullmatch(self.etag) and not encrypted and "SSECustomerAlgorithm" not in answer:
            self.md5 = self.etag.strip('"')

    def _receive(self, body: Any, deadline: float) -> None:
        """Take what there is, piece by piece: `read` would wait for all that it is asked for."""
        assert self._stop is not None
        counts = self._service.counts
        while self._next < self._stop:
            piece = body.read1(min(_PIECE, self._stop - self._next))
            if not piece:
                raise EOFError(f"the answer ended {self._stop - self._next} bytes early")
            self._pieces.append(piece)
            self._next += len(piece)
            counts.add(bytes_read=len(piece))
            if self._service.clock.now() > deadline and self._next < self._stop:
                raise TimeoutError("the answer came too slowly")
        body.read()  # nothing is left; this gives the connection back
