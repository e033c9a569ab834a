"""An S3 server for benchmarks: shards of photos on it, and what was asked of it."""
# ruff: noqa: PLC0415 (contenders of other interpreters import this file, without boto3)

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from scripts import bench_process
from scripts.bench_loader import make_photos
from scripts.bench_peers import ROOT
from sharding.errors import DataError
from tests.fault_proxy import BUCKET, Fault, FaultProxy, Seen, s3_endpoint

QUIET_S = 1.0  # without a request: what was to be fetched has come


def environment(endpoint: str) -> dict[str, str]:
    """Where a child finds the server: each library has its own variable for it."""
    region = os.environ.get("AWS_REGION", "us-east-1")
    return bench_process.environment() | {
        "AWS_ENDPOINT_URL": endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
    }


@dataclass
class Meter(FaultProxy):
    """A proxy that knows what went through it."""

    sent: list[tuple[float, int]] = field(default_factory=list)
    """When (time.perf_counter), and how many bytes."""
    asked: list[float] = field(default_factory=list)
    """When a request came."""

    def take(self, seen: Seen) -> Fault | None:
        """See FaultProxy."""
        self.asked.append(time.perf_counter())
        return super().take(seen)

    def pace(self, size: int) -> None:
        """See FaultProxy."""
        self.sent.append((time.perf_counter(), size))
        super().pace(size)

    def settle(self) -> None:
        """Wait until nobody asks for anything."""
        while not self.sent or time.perf_counter() - self.sent[-1][0] < QUIET_S:
            time.sleep(0.05)

    def reads(self) -> int:
        """Requests for objects."""
        return sum(one.method == "GET" and "list-type" not in one.path for one in self.seen)


class Server:
    """An S3 server: moto's, started here, or that of an endpoint; what is put there is removed."""

    def __init__(self, endpoint: str | None) -> None:
        import boto3

        os.environ.setdefault("AWS_REGION", "us-east-1")
        before = set(_children())
        self.endpoint = endpoint or s3_endpoint()
        new = [pid for pid in _children() if pid not in before]
        self._process = new[0] if new and endpoint is None else None
        self.title = "moto on loopback" if endpoint is None else endpoint
        region = os.environ["AWS_REGION"]
        self._s3 = boto3.client("s3", endpoint_url=self.endpoint, region_name=region)
        self._keys: list[str] = []
        if BUCKET not in {bucket["Name"] for bucket in self._s3.list_buckets()["Buckets"]}:
            self._s3.create_bucket(Bucket=BUCKET)

    def upload(self, folder: Path, prefix: str) -> None:
        """Put all files below a folder there, under their relative names."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            self._s3.upload_file(str(path), BUCKET, key)
            self._keys.append(key)

    def clear(self) -> None:
        """Remove what was put there."""
        for key in self._keys:
            self._s3.delete_object(Bucket=BUCKET, Key=key)

    def cpu_seconds(self) -> float:
        """What the server has used of the processor; 0 where it is not ours."""
        if self._process is None:
            return 0.0
        values = Path(f"/proc/{self._process}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, values[11:13])) / os.sysconf("SC_CLK_TCK")


def _children() -> list[int]:
    try:
        return [
            int(pid)
            for path in Path("/proc/self/task").glob("*/children")
            for pid in path.read_text().split()
        ]
    except OSError:
        return []


def make_shards(images: Path, work: Path, count: int, *, shards: int) -> tuple[Path, int]:
    """WORK/photos of `count` images, and WORK/shards/train; returns that and how many photos.

    Raises DataError where there are none.
    """
    found = (path for path in images.rglob("*") if path.is_file())
    sources = sorted(path for path in found if path.suffix.lower() in {".jpg", ".jpeg"})
    if not sources:
        raise DataError(f"--images {images}: no *.jpg or *.jpeg in it")
    make_photos(sources[:count], work, count)
    photographs, out = str(work / "photos"), work / "shards"
    samples = str(math.ceil(count / shards))
    subprocess.run(
        [sys.executable, "shard.py", "pack", photographs, str(out), "--max_samples", samples],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return out / "train", len(sources)


def wait_for_server() -> None:
    """Return when the server that workers are forked from has imported what they need."""
    from sharding.process import FROM_SERVER

    process = FROM_SERVER.Process(target=os.getpid)
    process.start()
    process.join()


def tars(work: Path) -> list[Path]:
    """Those that make_shards has made."""
    return sorted((work / "shards" / "train").glob("*.tar"))
