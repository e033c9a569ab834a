"""The way to S3: wrong settings and a service that is not there are told at once, or in time."""

import datetime as dt
import os
from dataclasses import replace
from pathlib import Path

import pytest

import sharding.s3_client
from sharding.errors import UsageError
from sharding.retry import GaveUpError, RetryPolicy
from sharding.s3 import S3Store
from tests.fault_proxy import Fault, FaultProxy, s3_endpoint
from tests.ports import free_port
from tests.s3_stores import IMPATIENT


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [("localhost:9000", "'localhost:9000' is not like"), ("http://u:secret@h", "holds a user")],
)
def test_endpoints_that_are_none(endpoint: str, text: str) -> None:
    """An endpoint is a URL without credentials; those are not repeated."""
    with pytest.raises(UsageError, match=text) as caught:
        S3Store("s3://b", endpoint=endpoint)
    assert "secret" not in str(caught.value)


def test_no_credentials(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without credentials the first request is an error that says where they are looked for."""
    endpoint = s3_endpoint()  # which sets credentials for itself
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(sharding.s3_client, "_connections", {})
    with pytest.raises(UsageError, match=r"NoCredentialsError \(request 1\); see the URL, and the"):
        S3Store(folder, endpoint=endpoint).sizes()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setattr(sharding.s3_client, "_connections", {})
    with pytest.raises(UsageError, match=r"ProfileNotFound \(request 1\)"):
        S3Store(folder, endpoint=endpoint).sizes()


def test_nobody_listens(folder: str) -> None:
    """A wrong address is an error of the system, after the allowed requests."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(GaveUpError, match=r"in 3 requests .* at last .*Connection refused"):
        S3Store(folder, endpoint=endpoint, policy=IMPATIENT).sizes()


def test_a_wrong_address_is_told_before_the_budget_is_spent(folder: str) -> None:
    """A service that has never answered is not waited for as one that has."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    policy = replace(RetryPolicy(), first_wait_s=0.01, longest_wait_s=0.01, reach_s=0.05)
    with pytest.raises(UsageError, match=r"has not answered in .*Connection refused; see the end"):
        S3Store(folder, endpoint=endpoint, policy=policy).sizes()


def test_a_service_that_answered_before_is_waited_for(folder: str) -> None:
    """The budget counts as soon as anybody has answered, be it that there is too much to do."""
    policy = replace(IMPATIENT, reach_s=1e-9)
    with FaultProxy(s3_endpoint()) as proxy:
        store = S3Store(folder, endpoint=proxy.url, policy=policy)
        proxy.plan([Fault(kind="status", status=503, code="SlowDown")] * 3)
        with pytest.raises(GaveUpError, match="503 SlowDown"):
            store.sizes()
        assert store.service.connection.answered
    gone = S3Store(folder, endpoint=f"http://127.0.0.1:{free_port()}", policy=policy)
    gone.service.connection.answered = True
    with pytest.raises(GaveUpError, match="Connection refused"):
        gone.sizes()


def test_a_service_with_too_much_to_do_is_asked_less_at_a_time(folder: str) -> None:
    """503 halves the number of requests under way; answers let it grow again."""
    with FaultProxy(s3_endpoint()) as proxy:
        store = S3Store(folder, endpoint=proxy.url, policy=IMPATIENT)
        limiter = store.service.connection.limiter
        most = limiter.allowed
        proxy.plan([Fault(kind="status", status=503, code="SlowDown")] * 2)
        store.sizes()
        assert most // 4 <= limiter.allowed <= most // 4 + 1
        for _ in range(2 * most):
            store.sizes()
        assert limiter.allowed > most // 4 + 1


@pytest.mark.skipif(
    "SHARDSTREAM_TEST_S3_ENDPOINT" not in os.environ, reason="moto does not check signatures"
)
def test_a_real_server_refuses(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key, a wrong clock and a missing bucket fail at the first request."""
    endpoint = s3_endpoint()
    with pytest.raises(UsageError, match=r"404 NoSuchBucket \(request 1\)"):
        S3Store("s3://there-is-none/x", endpoint=endpoint).sizes()
    with monkeypatch.context() as patch:
        then = dt.datetime.now(dt.timezone.utc) - dt.timedelta(hours=1)
        patch.setattr("botocore.auth.get_current_datetime", lambda **_: then.replace(tzinfo=None))
        with pytest.raises(UsageError, match=r"403 RequestTimeTooSkewed \(request 1\)"):
            S3Store(folder, endpoint=endpoint).sizes()
    monkeypatch.setattr(sharding.s3_client, "_connections", {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match=r"403 SignatureDoesNotMatch \(request 1\)"):
        S3Store(folder, endpoint=endpoint).sizes()
