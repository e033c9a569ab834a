"""The proxy itself: without faults it changes nothing, and it keeps its rate."""

import time
from uuid import uuid4

from sharding.s3 import S3Store
from tests.fault_proxy import BUCKET, FaultProxy, s3_endpoint


def test_rate() -> None:
    """Bytes pass as they are, and no faster than allowed."""
    url, data = f"s3://{BUCKET}/{uuid4().hex}", bytes(range(250)) * 8_000
    with FaultProxy(s3_endpoint(), bytes_per_s=10e6) as proxy:
        store = S3Store(url, endpoint=proxy.url)
        with store.create("a") as stream:
            stream.write(data)
        began = time.monotonic()
        assert store.read("a") == data
        assert time.monotonic() - began > 0.15
    assert [seen.method for seen in proxy.seen] == ["PUT", "GET"]
