"""What the tests of S3 share: limits that fail fast, and an object behind the proxy."""

from dataclasses import replace
from typing import Any

import boto3
import numpy as np

from sharding.retry import RetryPolicy
from sharding.s3 import S3Store
from sharding.store import Store
from tests.fault_proxy import FaultProxy, s3_endpoint

BYTES = np.random.default_rng(1).bytes(200_000)
POLICY = RetryPolicy(budget_s=20, requests=25, first_wait_s=0.005, longest_wait_s=0.02, stall_s=5)
# Where only time can tell: a request of BYTES may take 0.5 + 0.2 + 0.5 s.
HURRIED = replace(POLICY, connect_s=0.5, stall_s=0.5)
BUDGET_S = HURRIED.seconds_for(len(BYTES)) + HURRIED.stall_s
IMPATIENT = replace(HURRIED, requests=3)


def store_with_bytes(proxy: FaultProxy, folder: str) -> S3Store:
    """A store behind the proxy, which has no faults planned, that holds BYTES as `a`."""
    proxy.plan([])
    proxy.method = "GET"
    store = S3Store(folder, endpoint=proxy.url, policy=POLICY)
    put(store, "a", BYTES)
    return store


def put(store: Store, name: str, data: bytes) -> None:
    """Write one object."""
    with store.create(name) as stream:
        stream.write(data)


def client() -> Any:
    """A client of boto3 alone."""
    return boto3.client("s3", endpoint_url=s3_endpoint(), region_name="us-east-1")
