"""An S3 server for tests, and a proxy before it that puts faults on the wire.

The server is moto's, started once; with SHARDSTREAM_TEST_S3_ENDPOINT set, the one that is there
(its keys in the usual variables of AWS).
"""

import atexit
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import boto3

from tests.ports import free_port

BUCKET = "shardstream-test"
_CHUNK = 64 << 10
_CREDIT_S = 0.02
_END_OF_STALL_S = 20  # if the client does not go away


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to the answer of one request."""

    kind: Literal["reset", "close", "stall", "trickle", "flip", "status"]
    at: int = 0
    """Bytes of the body that pass first; below 0, not even the answer's head."""
    bytes_per_s: float = 1000
    """Of a trickle."""
    status: int = 503
    code: str = "SlowDown"
    """What S3 calls the status."""
    forward: bool = False
    """A status that is answered though the request was carried out."""


class Seen(NamedTuple):
    """A request that came by."""

    method: str
    path: str
    range: str
    port: int
    """The client's: another connection has another one."""


@dataclass
class FaultProxy:
    """Passes requests on to `upstream`; those of `method` meet the queued faults, one each.

    bytes_per_s limits what all answers together may take.
    """

    upstream: str
    method: str = "GET"
    bytes_per_s: float | None = None
    faults: deque[Fault] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> "FaultProxy":  # noqa: PYI034  (typing has Self from 3.11 on)
        self._lock = threading.Lock()
        self._free_at = 0.0
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()

    def plan(self, faults: Iterable[Fault]) -> None:
        """Forget what was, and queue these faults."""
        with self._lock:
            self.seen.clear()
            self.faults = deque(faults)

    def take(self, seen: Seen) -> Fault | None:
        """Log a request, and take the fault that it meets."""
        with self._lock:
            self.seen.append(seen)
            return self.faults.popleft() if seen.method == self.method and self.faults else None

    def pace(self, size: int) -> None:
        """Wait until so many bytes may go."""
        if self.bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            # What a sleep took too long is made up for, but not a pause of nobody asking.
            self._free_at = max(self._free_at, now - _CREDIT_S) + size / self.bytes_per_s
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    upstream: http.client.HTTPConnection | None = None

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client went away, as it should
            self.close_connection = True
        finally:
            if self.upstream is not None:
                self.upstream.close()

    def answer(self) -> None:
        """One request."""
        seen = Seen(self.command, self.path, self.headers.get("Range", ""), self.client_address[1])
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.take(seen)
        if fault is not None and fault.kind == "status":
            if fault.forward:
                self._ask(sent).read()
            self._refuse(fault)
        else:
            self._pass_on(self._ask(sent), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 (their names)

    def _ask(self, sent: bytes) -> http.client.HTTPResponse:
        if self.upstream is None:
            self.upstream = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc)
        # The host is signed, so it goes on as the client gave it.
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"expect", "connection"}:
                self.upstream.putheader(name, value)
        self.upstream.endheaders(sent)
        return self.upstream.getresponse()

    def _refuse(self, fault: Fault) -> None:
        body = f"<Error><Code>{fault.code}</Code><Message>testing</Message></Error>".encode()
        self.send_response(fault.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _pass_on(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        length = answer.headers.get("Content-Length")
        whole = answer.read() if length is None else None  # chunked: its length is known then
        if fault is not None and fault.at < 0:
            self._spoil(b"", fault)
            return
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in {"transfer-encoding", "content-length", "connection"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(whole)) if whole is not None else str(length))
        self.end_headers()
        if self.command == "HEAD":
            answer.read()
            return
        if fault is not None:
            self._spoil(answer.read() if whole is None else whole, fault)
        elif whole is not None:
            self.wfile.write(whole)
        else:
            while chunk := answer.read(_CHUNK):
                self.proxy.pace(len(chunk))
                self.wfile.write(chunk)

    def _spoil(self, body: bytes, fault: Fault) -> None:
        if fault.kind == "flip":
            at = fault.at % len(body)
            self.wfile.write(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
            return
        self.wfile.write(body[: max(0, fault.at)])
        self.close_connection = True
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # now, and without the server's polite shutdown
        elif fault.kind == "stall":
            self.connection.settimeout(_END_OF_STALL_S)
            self.connection.recv(1)  # until the client closes
        elif fault.kind == "trickle":
            step = max(1, int(fault.bytes_per_s / 100))
            for first in range(fault.at, len(body), step):
                self.wfile.write(body[first : first + step])
                time.sleep(step / fault.bytes_per_s)


@cache
def s3_endpoint() -> str:
    """URL of a server that has the bucket for tests; moto's ends with this process."""
    endpoint = os.environ.get("SHARDSTREAM_TEST_S3_ENDPOINT") or _start_moto()
    s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    if BUCKET not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=BUCKET)
    return endpoint


def _start_moto() -> str:
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(server.kill)
    for _ in range(600):
        assert server.poll() is None, "moto's server did not start; pip install 'moto[server]'"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return f"http://127.0.0.1:{port}"
    raise TimeoutError("moto's server does not answer")
