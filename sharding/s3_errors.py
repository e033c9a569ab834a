"""What the wire and an S3 service answer, and what it means: try again, or the error for users."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager

import botocore.exceptions as boto_errors
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from sharding.errors import DataError, UsageError
from sharding.retry import GaveUpError, OverloadedError, PassingError, UnreachableError


class RefusedError(Exception):
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
_WIRE = (*_PASSING, boto_errors.BotoCoreError, boto_errors.ClientError, RefusedError)
_OVERLOADED = {"RequestThrottled", "SlowDown", "Throttling", "ThrottlingException"}
# Beside 429 and 500 and above. Of the digests: the bytes were damaged on their way.
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
    *_OVERLOADED,
}
_OTHER = (UsageError, "the service refuses such a request")
_CREDENTIALS = (UsageError, "see the credentials, their expiry and the region")
CHANGED = "was changed after it was opened: let nobody write to it, and start again"
_CHANGED = (DataError, f"the object {CHANGED}")
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
def explained(what: str, number: int) -> Iterator[None]:
    """Turn what boto3 and the wire raise into PassingError, or into the error that users meet."""
    try:
        yield
    except _WIRE as error:
        cause = _cause(error)
        if _passes(error):
            raise _kind(error)(cause) from error
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
    if isinstance(error, (EOFError, TimeoutError, RefusedError)):
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


def _kind(error: Exception) -> type[PassingError]:
    code, status = _code(error)
    if status in {429, 503} or code in _OVERLOADED:
        return OverloadedError
    unreachable = (boto_errors.EndpointConnectionError, boto_errors.ConnectTimeoutError)
    return UnreachableError if isinstance(error, unreachable) else PassingError


def _verdict(error: Exception) -> tuple[type[Exception], str]:
    code, status = _code(error)
    if isinstance(error, RefusedError):
        return DataError, "the service, or a proxy before it, does not serve ranges"
    if not status:
        return UsageError, "see the URL, and the settings of AWS (AWS_PROFILE, credentials, region)"
    return _VERDICTS.get(code, _VERDICTS.get(status, _OTHER))
