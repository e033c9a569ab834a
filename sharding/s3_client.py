"""The way to an S3 service: settings, one client a process, requests until one succeeds.

The one place that imports boto3, which signs, finds credentials and keeps connections. Trying
again is ours (see retry.py): boto3 does not notice an answer that breaks off, stalls or trickles in
the middle of its body.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from sharding.errors import UsageError
from sharding.limiter import ConcurrencyLimiter
from sharding.retry import (
    Clock,
    Counts,
    OverloadedError,
    PassingError,
    RetryPolicy,
    UnreachableError,
    persist,
)
from sharding.s3_errors import explained

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_CONNECTIONS = 64  # of a process, at most


@dataclass(frozen=True, kw_only=True)
class Service:
    """Where requests go, and how long they may take.

    Credentials are no part of it: boto3 finds them, in each process anew.
    """

    endpoint: str | None = None
    """http(s)://host:port; None: what AWS's configuration says."""
    region: str | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Clock = field(default_factory=Clock, compare=False)
    """No part of what a service is: the connection is the same."""

    def __post_init__(self) -> None:
        if self.endpoint is None:
            return
        parts = urlsplit(self.endpoint)
        if parts.username or parts.password:
            raise UsageError("the S3 endpoint holds a user or a password; use AWS_PROFILE instead")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"the S3 endpoint {self.endpoint!r} is not like https://host:port")

    @property
    def counts(self) -> Counts:
        """What this process has asked of the service."""
        return self.connection.counts

    @property
    def connection(self) -> "Connection":
        """This process's own."""
        place = (os.getpid(), self)
        return _connections.get(place) or _connections.setdefault(place, Connection(self))

    def ask(
        self, what: str, request: Callable[["S3Client"], T], *, size: int = 0, quick: bool = False
    ) -> T:
        """Make a request until it succeeds. `what` is to be read after "cannot".

        size: the bytes that it moves; quick: only a few tries, as nothing depends on it.
        """
        policy = self.policy
        if quick:
            policy = replace(policy, budget_s=policy.stall_s, requests=3)
        what = f"cannot {what}"
        connection, began = self.connection, self.clock.now()

        def attempt(number: int) -> T:
            with connection.limiter.enter() as turn:
                try:
                    with explained(what, number):
                        answer = request(connection.client)
                except UnreachableError as error:
                    spent = self.clock.now() - began
                    if connection.answered or spent <= policy.reach_s:
                        raise
                    raise UsageError(
                        f"{what}: {self.endpoint or 'the S3 endpoint'} has not answered in "
                        f"{number} requests over {spent:.0f} s, at last {error}; see the endpoint "
                        "(--s3_endpoint, AWS_ENDPOINT_URL), the region and the network"
                    ) from error
                except PassingError as error:
                    connection.answered = True
                    if isinstance(error, OverloadedError):
                        connection.limiter.slower(turn)
                    raise
            connection.answered = True
            connection.limiter.faster()
            return answer

        return persist(
            attempt, what=what, size=size, policy=policy, clock=self.clock, counts=self.counts
        )


class Connection:
    """A process's client of a service, and what was asked through it."""

    def __init__(self, service: Service) -> None:
        self.counts = Counts()
        self.limiter = ConcurrencyLimiter(_CONNECTIONS)
        self.answered = False
        """Whether anybody ever was there."""
        self._service = service
        self._lock = threading.Lock()
        self._client: S3Client | None = None

    @property
    def client(self) -> "S3Client":
        """Made at its first use."""
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
_connections: dict[tuple[int, Service], Connection] = {}
