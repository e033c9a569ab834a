"""Answers of S3: what may pass is told from what will not."""

import pytest
from botocore.exceptions import ClientError, NoRegionError, ParamValidationError, SSLError
from botocore.parsers import ResponseParserError

from sharding.errors import UsageError
from sharding.retry import PassingError
from sharding.s3_errors import explained


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 429}}, ""), True),  # type: ignore[typeddict-item]
        (ClientError({"Error": {"Code": "Odd"}}, ""), False),  # without a status
        (
            SSLError(endpoint_url="", error=OSError("[SSL: CERTIFICATE_VERIFY_FAILED] expired")),
            False,
        ),
        (SSLError(endpoint_url="", error=OSError("EOF occurred in violation of protocol")), True),
        (ResponseParserError("no element found"), True),
        (NoRegionError(), False),
        (ParamValidationError(report="a bucket's name"), False),
    ],
)
def test_what_passes(error: Exception, passes: bool) -> None:
    """What the wire and an overloaded service do may pass; wrong settings and certificates not."""
    expected = PassingError if passes else UsageError
    with pytest.raises(expected), explained("cannot x", 1):
        raise error
