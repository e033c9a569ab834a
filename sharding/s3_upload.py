"""Objects on their way to an S3 service: in one request, or in parts while they are written."""

import base64
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from sharding.errors import DataError, UsageError
from sharding.s3_client import Service

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ListMultipartUploadsOutputTypeDef

T = TypeVar("T")

MIB = 1 << 20


def part_bytes(number: int) -> int:
    """Size of part 1, 2, ... of an upload: 10,000 hold the 5 TiB that an object may have.

    16 MiB each up to 16 GB (some services want equal parts), then growing up to 1.4 GiB.
    """
    return 16 * MIB * (100 + max(0, number - 1000)) // 100


@contextmanager
def create(service: Service, *, bucket: str, key: str, what: str) -> Iterator[BinaryIO]:
    """A stream whose object appears when the block ends well, or not at all: see Store.create."""
    upload = _Upload(service, bucket=bucket, key=key, what=what)
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


def sweep(
    service: Service, *, bucket: str, prefix: str, what: str, ours: Callable[[str], bool]
) -> None:
    """Remove the uploads directly below the prefix that did not come to their end.

    ours: whether an object of this name, without the prefix, is among what may be removed.
    """
    after: dict[str, str] = {}
    while True:
        page = _listed(service, what, Bucket=bucket, Prefix=prefix, **after)
        for upload in page.get("Uploads", []):
            name = upload["Key"].removeprefix(prefix)
            if "/" not in name and ours(name):
                _abort(service, what, bucket, upload["Key"], upload["UploadId"])
        key, upload_id = page.get("NextKeyMarker"), page.get("NextUploadIdMarker")
        if not page.get("IsTruncated") or not key or not upload_id:
            return
        after = {"KeyMarker": key, "UploadIdMarker": upload_id}


def _listed(service: Service, what: str, **place: str) -> "ListMultipartUploadsOutputTypeDef":
    return service.ask(
        what,
        lambda s3: s3.list_multipart_uploads(**place),  # type: ignore[arg-type]  # a TypedDict's
    )


class _Upload(io.RawIOBase):
    """An object on its way up, in parts if it is large.

    Holds one part in memory, and a copy of it while it is sent.
    """

    def __init__(self, service: Service, *, bucket: str, key: str, what: str) -> None:
        self._service = service
        self._bucket = bucket
        self._key = key
        self._what = what
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
        self._service.ask(self._what, self._complete)

    def abandon(self) -> None:
        """Let nothing stay of it, not even where the store went away in the middle."""
        self._abandoned = True
        if self._id:
            with suppress(OSError, UsageError, DataError):  # what led here matters more
                _abort(self._service, self._what, self._bucket, self._key, self._id)

    def _send_part(self, size: int) -> None:
        if not self._id:
            self._id = self._service.ask(
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
        service = self._service
        digest = hashlib.md5(data, usedforsecurity=False).digest()

        def send(s3: "S3Client") -> T:
            deadline = service.clock.now() + service.policy.seconds_for(len(data))
            body = _Body(data, lambda: service.clock.now() > deadline)
            return request(s3, Body=body, ContentMD5=base64.b64encode(digest).decode())

        answer = service.ask(self._what, send, size=len(data))
        service.counts.add(bytes_written=len(data))
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


def _abort(service: Service, what: str, bucket: str, key: str, upload_id: str) -> None:
    """Remove the parts of an upload that does not go on."""
    with suppress(FileNotFoundError):
        service.ask(
            what,
            lambda s3: s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id),
            quick=True,
        )
