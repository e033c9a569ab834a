#!/usr/bin/env python3
"""Measure training data from S3: our loader beside its peers, and behind a slow wire.

The work is that of scripts/bench_loader.py: random-resized crop to 224 and flip, uint8 out, whole
batches delivered to the main process. The photos are packed in each contender's own format, in
shards of equal size, and put on one server: moto's on loopback, or --endpoint. Rounds are
interleaved; in each, a contender runs in a new process with an empty cache of its own. It iterates
an epoch, waits until it asks nothing more of the server, and iterates another one. "images/s" is
from the delivery of batch K to that of the last (K = 2 x workers x prefetch + 2), "whole" from the
moment the first batch is asked for.

The second part, ours alone, puts a proxy before the server that lets all answers together take
--mb_per_s, for one node and for four (one after the other, each with its own cache and its part of
the lanes). Of each image that is delivered after the first K batches:

    wire time     its bytes / the proxy's rate: nothing is added for what is fetched twice
    decode time   seconds that the workers spent on anything but waiting for bytes / workers
    wait          seconds that the workers waited for bytes / workers / seconds in all

A real epoch reads tens of shards in each lane, one after the other. So that this short one does so
too, there are few lanes, a small window and small shards.
"""
# mypy: disable-error-code="import-not-found,import-untyped"
# ruff: noqa: PLC0415 (each contender is imported in the interpreter that has it)

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.bench_peers is found

from scripts.bench_loader import MissingError, last_line, machine, make_photos, peer_environment
from scripts.bench_peers import (
    PREFETCH,
    ROOT,
    SIZE,
    Epochs,
    decode_and_transform,
    litdata_sample,
    photos,
    through,
    transform,
    warm_up_batches,
)
from sharding.console import positive
from sharding.errors import DataError, UsageError, reports_errors
from tests.fault_proxy import BUCKET, Fault, FaultProxy, Seen, s3_endpoint

if TYPE_CHECKING:
    from loaders.stats import Counters

EXAMPLE = """examples:
  python scripts/bench_s3.py --images /data/imagenet/val --json s3.json
  python scripts/bench_s3.py --images /data/imagenet/val --peers none --mb_per_s 100
"""
SHARDS = 24
LANES = 4
WINDOW = 64
NODES = (1, 4)
CURL = "curl -s --retry 5 --retry-all-errors"  # moto closes a connection now and then
MAY_WAIT = 0.05
"""Share of the time that workers may wait beyond what the wire makes them."""
MAY_READ = 1.05
"""Times the data set that all nodes together may read in the first epoch."""
TIMEOUT_SECONDS = 600
QUIET_SECONDS = 1.0  # without a request: what was to be fetched has come


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the process of a contender is told."""

    contender: str
    endpoint: str
    prefix: str
    """Of the objects, below which each format has its own; without the bucket."""
    folder: str
    """Its own, empty."""
    workers: int
    batch: int
    """Samples of a global batch."""
    rank: int = 0
    world: int = 1

    @property
    def url(self) -> str:
        """Where all formats are."""
        return f"s3://{BUCKET}/{self.prefix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What a contender's process measured."""

    images: int
    """After the first batches, and so are `seconds` and `counters`."""
    seconds: float
    all_images: int
    all_seconds: float
    first_seconds: float
    """Until the first batch."""
    counters: dict[str, float]

    @property
    def rate(self) -> float:
        """Images a second after the first batches."""
        return self.images / self.seconds

    @property
    def all_rate(self) -> float:
        """The same from the first request on."""
        return self.all_images / self.all_seconds


# ----- contenders, in processes of their own

Opened = tuple[Epochs, "Callable[[], Counters] | None"]


def open_ours(task: Task, *, cached: bool) -> Opened:
    """StreamingLoader, with a cache of unlimited size or none."""
    from loaders.augment import AugmentConfig
    from loaders.loader import StreamingLoader
    from loaders.order import OrderConfig
    from loaders.prefetch import CacheConfig
    from loaders.reader import ShardReader
    from loaders.topology import Topology
    from sharding.dataset import PackedSplit

    split = PackedSplit.open(f"{task.url}/shards")
    split.check_present()
    loader = StreamingLoader(
        ShardReader(split),
        order=OrderConfig(lanes=LANES, window=WINDOW),
        augment=AugmentConfig(),
        topology=Topology(global_batch=task.batch, rank=task.rank, world=task.world),
        size=SIZE,
        workers=task.workers,
        prefetch=PREFETCH,
        cache=CacheConfig(folder=Path(task.folder), limit=10**12) if cached else None,
    )
    wait_for_server()

    def epochs(epoch: int) -> Iterator[Any]:
        loader.set_epoch(epoch)
        return (made.images for made in loader)

    return epochs, loader.counters


def wait_for_server() -> None:
    """Return when the server that workers are forked from has imported what they need."""
    from sharding.process import FROM_SERVER

    process = FROM_SERVER.Process(target=os.getpid)
    process.start()
    process.join()


def open_webdataset(task: Task) -> Opened:
    """Its own reader over our shards, through its own pipe: opener."""
    import webdataset as wds

    names = json.loads((Path(task.folder).parent / "tars.json").read_text())
    place = f"{task.endpoint}/{BUCKET}/{task.prefix}/shards"
    dataset = (
        wds.WebDataset([f"pipe:{CURL} {place}/{name}" for name in names], shardshuffle=len(names))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpeg;jpg", "cls")
        .map_tuple(transform(), int)
        .batched(task.batch, partial=False)
    )
    return through(wds.WebLoader, dataset, task.workers, batch_size=None), None


def pack_mosaic(work: Path, out: Path, size: int) -> None:
    """MDS, images as they are, in shards of `size` bytes."""
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit=size) as writer:
        for path, label in photos(work):
            writer.write({"image": Path(path).read_bytes(), "label": label})


def open_mosaic(task: Task) -> Opened:
    """MosaicML Streaming; it finds the server by S3_ENDPOINT_URL."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    prepare = decode_and_transform()

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> tuple[Any, int]:
            sample = super().__getitem__(at)
            return prepare(sample["image"]), sample["label"]

    dataset = Photos(
        remote=f"{task.url}/mosaic", local=task.folder, shuffle=True, batch_size=task.batch
    )
    return through(DataLoader, dataset, task.workers, batch_size=task.batch, drop_last=True), None


def pack_litdata(work: Path, out: Path, size: int) -> None:
    """LitData's chunks of `size` bytes, images as they are."""
    from litdata import optimize

    optimize(litdata_sample, photos(work), str(out), chunk_bytes=size, num_workers=1)


def open_litdata(task: Task) -> Opened:
    """LitData; it is told the server as a storage option."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # Its client refuses http://, which no option of its own lets it take.
    getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = True
    prepare = decode_and_transform()

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return prepare(sample["image"]), sample["label"]

    dataset = Photos(
        f"{task.url}/litdata",
        cache_dir=task.folder,
        storage_options={"endpoint_url": task.endpoint},
        shuffle=True,
        drop_last=True,
    )
    return through(
        StreamingDataLoader, dataset, task.workers, batch_size=task.batch, drop_last=True
    ), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A loader, and where it runs."""

    title: str
    open: Callable[[Task], Opened]
    venv: str = ""
    """Its interpreter: .bench/<venv>, or the current one if this is empty."""
    package: str = ""
    pack: Callable[[Path, Path, int], None] | None = None
    """Makes its format, if that is not our shards: (work, what to make, bytes of a shard)."""
    cached: bool = True
    """Whether its second epoch is to be told from its first."""


CONTENDERS = {
    "ours": Contender(title="shardstream", open=partial(open_ours, cached=True)),
    "ours-direct": Contender(
        title="shardstream without a cache", open=partial(open_ours, cached=False), cached=False
    ),
    "webdataset": Contender(
        title="webdataset, pipe:curl",
        open=open_webdataset,
        package="webdataset",
        cached=False,
    ),
    "mosaic": Contender(
        title="MosaicML Streaming",
        open=open_mosaic,
        venv="mosaic",
        package="mosaicml-streaming",
        pack=pack_mosaic,
    ),
    "litdata": Contender(
        title="LitData", open=open_litdata, venv="litdata", package="litdata", pack=pack_litdata
    ),
}
PEERS = [name for name in CONTENDERS if not name.startswith("ours")]


def iterate(
    batches: Iterable[Any], counters: "Callable[[], Counters] | None", *, skip: int
) -> Epoch:
    """Time an epoch whose first `skip` batches are not counted."""
    begin = time.perf_counter()
    total = before = 0
    first = start = stop = math.nan
    then = None
    for number, images in enumerate(batches, 1):
        assert tuple(images.shape[1:]) == (SIZE, SIZE, 3), images.shape
        total += len(images)
        stop = time.perf_counter()
        if number == 1:
            first = stop
        if number == skip:
            before, start = total, stop
            then = counters and counters()
    did = counters().minus(then)._asdict() if counters and then else {}
    return Epoch(
        images=total - before,
        seconds=stop - start,
        all_images=total,
        all_seconds=stop - begin,
        first_seconds=first - begin,
        counters=did,
    )


def serve(task: Task) -> None:
    """Iterate one epoch for each number read; print what was measured as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import PIL
    import torch

    torch.set_num_threads(1)
    contender = CONTENDERS[task.contender]
    epochs, counters = contender.open(task)
    known = {"torch": version("torch"), "pillow": PIL.__version__}
    if contender.package:
        known[contender.package] = version(contender.package)
    print(json.dumps(known), file=answers, flush=True)
    skip = warm_up_batches(task.workers)
    for line in sys.stdin:
        made = iterate(epochs(int(line)), counters, skip=skip)
        print(json.dumps(asdict(made)), file=answers, flush=True)


class Runner:
    """The process that a contender runs in; it and all that it started end with close()."""

    def __init__(self, task: Task) -> None:
        """Raises MissingError if it does not start."""
        folder = Path(task.folder)
        folder.mkdir()
        self._log = folder.with_suffix(".log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command(CONTENDERS[task.contender].venv, "--child", json.dumps(asdict(task))),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(task.endpoint),
                cwd=folder,
                start_new_session=True,
            )
        self.versions = self._answer()

    def run(self, epoch: int) -> Epoch:
        """Iterate an epoch. Raises MissingError if the process ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(epoch, file=self._process.stdin, flush=True)
        return Epoch(**self._answer())

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT_SECONDS, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)  # it may have to say why
            self.close()
            raise MissingError(last_line(self._log))
        answer: dict[str, Any] = json.loads(line)
        return answer


def command(venv: str, *arguments: str) -> list[str]:
    """Run this file in an interpreter of .bench/, or the current one. Raises MissingError."""
    python = ROOT / ".bench" / venv / "bin" / "python" if venv else Path(sys.executable)
    if not python.exists():
        raise MissingError(f"scripts/bench_setup.sh {venv} installs it")
    return [str(python), __file__, *arguments]


def environment(endpoint: str) -> dict[str, str]:
    """Where a child finds the server: each library has its own variable for it."""
    region = os.environ.get("AWS_REGION", "us-east-1")
    return peer_environment() | {
        "AWS_ENDPOINT_URL": endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
    }


# ----- the server


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
        while not self.sent or time.perf_counter() - self.sent[-1][0] < QUIET_SECONDS:
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


# ----- the first part: all contenders


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Two epochs of one contender, from an empty cache."""

    contender: str
    first: Epoch
    second: Epoch
    server_cpu: float
    """Seconds of the processor that the server took for the first."""


def measure_all(
    names: list[str], work: Path, server: Server, options: argparse.Namespace
) -> tuple[list[Round], dict[str, dict[str, str]], dict[str, str]]:
    """Return (all rounds, versions of each contender, why contenders are missing)."""
    rounds: list[Round] = []
    versions: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    for number in range(options.rounds):
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if name in missing:
                continue
            _progress(f"round {number + 1} of {options.rounds}: {name}")
            task = Task(
                contender=name,
                endpoint=server.endpoint,
                prefix=work.name,
                folder=str(work / f"{name}-{number}"),
                workers=options.workers,
                batch=options.batch,
            )
            try:
                if number == 0:
                    pack_and_upload(name, work, server)
                made, versions[name] = measure(task, server)
            except MissingError as error:
                missing[name] = str(error)
                rounds[:] = [other for other in rounds if other.contender != name]
                continue
            rounds.append(made)
            shutil.rmtree(task.folder)
    return rounds, versions, missing


def pack_and_upload(name: str, work: Path, server: Server) -> None:
    """A peer's format of the photos onto the server, unless it reads our shards."""
    contender = CONTENDERS[name]
    if contender.pack is None:
        return
    log = work / f"pack-{name}.log"
    shard_bytes = max(path.stat().st_size for path in _tars(work))
    with log.open("w") as output:
        status = subprocess.run(
            command(contender.venv, "--pack", name, str(work), str(shard_bytes)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=peer_environment(),
            cwd=work,
            check=False,
        ).returncode
    if status:
        raise MissingError(last_line(log))
    server.upload(work / name, f"{work.name}/{name}")
    shutil.rmtree(work / name)


def measure(task: Task, server: Server) -> tuple[Round, dict[str, str]]:
    """Two epochs in a new process, and its versions."""
    runner = Runner(task)
    try:
        cpu = server.cpu_seconds()
        first = runner.run(0)
        cpu = server.cpu_seconds() - cpu
        _wait_until_full(Path(task.folder))
        second = runner.run(1)
    finally:
        runner.close()
    return Round(contender=task.contender, first=first, second=second, server_cpu=cpu), (
        runner.versions
    )


def _wait_until_full(folder: Path) -> None:
    """Return when a cache does not grow any more."""
    size = -1
    while size != (size := sum(path.stat().st_size for path in _files(folder))):
        time.sleep(QUIET_SECONDS)


def _tars(work: Path) -> list[Path]:
    return sorted((work / "shards" / "train").glob("*.tar"))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def summarize(rounds: list[Round]) -> list[dict[str, Any]]:
    """One row for each contender and epoch that is told from others, in the contenders' order."""
    rows = []
    for name, contender in CONTENDERS.items():
        mine = [one for one in rounds if one.contender == name]
        for which in ("first", "second") if mine and contender.cached else ("first",) * bool(mine):
            epochs: list[Epoch] = [getattr(one, which) for one in mine]
            rows.append(
                {
                    "contender": name,
                    "epoch": which,
                    "median": statistics.median(epoch.rate for epoch in epochs),
                    "min": min(epoch.rate for epoch in epochs),
                    "max": max(epoch.rate for epoch in epochs),
                    "whole": statistics.median(epoch.all_rate for epoch in epochs),
                    "first_batch_seconds": statistics.median(e.first_seconds for e in epochs),
                    "server_cpu_ms": statistics.median(
                        1e3 * one.server_cpu / one.first.all_images for one in mine
                    )
                    if which == "first"
                    else 0.0,
                }
            )
    return rows


def fastest(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Whether ours is the fastest in each epoch: 'kept' or 'missed', by what it is."""
    found = {}
    for which in ("first", "second"):
        rates = {
            row["contender"]: row["median"]
            for row in rows
            if row["epoch"] == which or not CONTENDERS[row["contender"]].cached
        }
        peers = {name: rate for name, rate in rates.items() if name in PEERS}
        if "ours" in rates and peers:
            best = max(peers, key=peers.__getitem__)
            times = rates["ours"] / peers[best]
            verdict = "kept" if times > 1 else "missed"
            found[f"ours the fastest in the {which} epoch"] = f"{verdict} ({times:.2f} x {best})"
    return found


def table(rows: list[dict[str, Any]], missing: dict[str, str]) -> str:
    """The rows for people."""
    heads = ("images/s", "min", "max", "whole", "1st batch", "server CPU")
    lines = [f"{'from S3':38}" + "".join(f"{head:>11}" for head in heads)]
    for row in rows:
        contender = CONTENDERS[row["contender"]]
        title = contender.title + (f", {row['epoch']} epoch" if contender.cached else "")
        rates = "".join(f"{row[key]:11,.0f}" for key in ("median", "min", "max", "whole"))
        cpu = f"{row['server_cpu_ms']:8.2f} ms" if row["server_cpu_ms"] else f"{'-':>11}"
        lines.append(f"{title:38}{rates}{row['first_batch_seconds']:9.2f} s{cpu}")
    lines += [f"{CONTENDERS[name].title}: missing: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


# ----- the second part: ours, on a slow wire


@dataclass(frozen=True, kw_only=True, slots=True)
class Slow:
    """An epoch through the limited wire on all nodes, one after the other, and the next one."""

    nodes: int
    epochs: list[Epoch]
    """The first one of each node."""
    workers: int
    bytes_per_s: float
    data_bytes: int
    read_bytes: int
    """From the server in the first epoch, until nothing more was asked for."""
    second_requests: int
    second_rates: list[float]

    @property
    def wire(self) -> float:
        """Seconds."""
        return sum(epoch.counters["read_bytes"] for epoch in self.epochs) / self.bytes_per_s

    @property
    def decode(self) -> float:
        """Seconds."""
        return sum(epoch.counters["decode_s"] for epoch in self.epochs) / self.workers

    @property
    def seconds(self) -> float:
        """Of all nodes, one after the other."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def wait(self) -> float:
        """Share of the time that workers wait for bytes."""
        return sum(e.counters["read_s"] for e in self.epochs) / self.workers / self.seconds

    @property
    def allowed(self) -> float:
        """What that may be."""
        return max(0.0, self.wire - self.decode) / self.seconds + MAY_WAIT

    @property
    def copies(self) -> float:
        """Bytes that all nodes read in the first epoch, in sizes of the data set."""
        return self.read_bytes / self.data_bytes


def measure_slow(nodes: int, number: int, work: Path, endpoint: str, options: Any) -> Slow:
    """One round. Raises MissingError if a process ends."""
    epochs, second_rates, second_requests, read_bytes = [], [], 0, 0
    rate = options.mb_per_s * 1e6
    for rank in range(nodes):
        meter = Meter(endpoint, bytes_per_s=rate)
        with meter:
            task = Task(
                contender="ours",
                endpoint=meter.url,
                prefix=work.name,
                folder=str(work / f"slow-{nodes}-{rank}-{number}"),
                workers=options.workers,
                batch=options.batch,
                rank=rank,
                world=nodes,
            )
            runner = Runner(task)
            try:
                epochs.append(runner.run(0))
                meter.settle()
                read_bytes += sum(size for _, size in meter.sent)
                before = meter.reads()
                second_rates.append(runner.run(1).rate)
                second_requests += meter.reads() - before
            finally:
                runner.close()
        shutil.rmtree(task.folder)
    data_bytes = sum(path.stat().st_size for path in _tars(work))
    return Slow(
        nodes=nodes,
        epochs=epochs,
        workers=options.workers,
        bytes_per_s=rate,
        data_bytes=data_bytes,
        read_bytes=read_bytes,
        second_requests=second_requests,
        second_rates=second_rates,
    )


def slow_line(nodes: int, each: list[Slow]) -> tuple[str, dict[str, str]]:
    """What is to be said of the rounds with so many nodes, and what must hold of them."""

    def middle(values: Iterable[float]) -> float:
        return statistics.median(values)

    images = sum(epoch.images for epoch in each[0].epochs)
    wait, allowed = middle(s.wait for s in each), middle(s.allowed for s in each)
    copies = middle(s.copies for s in each)
    requests = max(s.second_requests for s in each)
    who = f"{nodes} node{'s' * (nodes > 1)}"
    line = (
        f"{who}, {each[0].bytes_per_s / 1e6:g} MB/s: {images} images after the first batches in "
        f"{middle(s.seconds for s in each):.2f} s; wire time {middle(s.wire for s in each):.2f} s, "
        f"decode time {middle(s.decode for s in each):.2f} s; workers wait {wait:.1%} of it; then "
        f"{middle(rate for s in each for rate in s.second_rates):,.0f} images/s in the second epoch"
    )

    def verdict(kept: bool, value: str) -> str:
        return f"{'kept' if kept else 'missed'} ({value})"

    return line, {
        f"{who}: wait at most max(0, wire - decode) / seconds + {MAY_WAIT:.0%} = {allowed:.1%}": (
            verdict(middle(s.wait - s.allowed for s in each) <= 0, f"{wait:.1%}")
        ),
        f"{who}: no request to the store in the second epoch": verdict(
            requests == 0, str(requests)
        ),
        f"{who}: at most {MAY_READ} x the data set read in the first epoch": verdict(
            copies <= MAY_READ, f"{copies:.3f} x"
        ),
    }


# ----- all of it


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Pack, upload, measure, print."""
    options = _options(arguments)
    if options.child:
        serve(Task(**json.loads(options.child)))
        return 0
    if options.pack:
        name, work, size = options.pack
        pack = CONTENDERS[name].pack
        assert pack is not None
        pack(Path(work), Path(work) / name, int(size))
        return 0
    _check(options)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_s3_")))
        shards, sources = make_shards(options.images, work, options.count, shards=SHARDS)
        names = [path.name for path in _tars(work)]
        (work / "tars.json").write_text(json.dumps(names))
        server = Server(options.endpoint)
        stack.callback(server.clear)
        server.upload(shards, f"{work.name}/shards")
        load = [os.getloadavg()[0]]
        rounds, versions, missing = measure_all(_names(options.peers), work, server, options)
        slow: dict[int, list[Slow]] = {nodes: [] for nodes in NODES}
        for number in range(options.rounds):
            for nodes in NODES:
                _progress(f"round {number + 1} of {options.rounds}: {nodes} nodes, slow wire")
                try:
                    made = measure_slow(nodes, number, work, server.endpoint, options)
                except MissingError as error:
                    raise ChildProcessError(f"cannot measure ours: {error}") from error
                slow[nodes].append(made)
        _progress("")
        load.append(os.getloadavg()[0])
    rows, known = summarize(rounds), machine()
    print(
        f"{known['cpu']}, {known['cores']} cores, load {load[0]:.1f} before and {load[1]:.1f} "
        f"after; {sources} photos, {options.rounds} rounds of {options.count}, {options.workers} "
        f"workers"
    )
    if not options.endpoint:
        print(
            f"The server is moto, in Python on the same {known['cores']} cores: what it takes of "
            "the processor for each image (server CPU; all rates are lower for it) is missing to "
            "the decoders, and a ranged read costs it a copy of the whole shard."
        )
    print(table(rows, missing))
    must_hold = fastest(rows)
    for nodes, each in slow.items():
        line, found = slow_line(nodes, each)
        print(line)
        must_hold |= found
    for what, verdict in must_hold.items():
        print(f"{what}: {verdict}")
    if options.json:
        result = {
            "command": shlex.join(sys.argv),
            "machine": known | {"load_average": load},
            "server": server.title,
            "versions": versions,
            "summary": rows,
            "missing": missing,
            "must_hold": must_hold,
            "rounds": [asdict(one) for one in rounds],
            "slow": [asdict(one) for each in slow.values() for one in each],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


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


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _names(peers: str) -> list[str]:
    """The contenders to measure; ours always."""
    if peers == "all":
        return list(CONTENDERS)
    chosen = set(peers.split(",")) - {"none"}
    if unknown := chosen - CONTENDERS.keys():
        raise UsageError(f"--peers: {', '.join(sorted(unknown))}? There are {', '.join(PEERS)}")
    return [name for name in CONTENDERS if name in chosen or name not in PEERS]


def _check(options: argparse.Namespace) -> None:
    """Find before the packing what cannot be measured."""
    _names(options.peers)
    if options.images is None:
        raise UsageError("give --images FOLDER, photographs at any depth")
    if options.batch % max(NODES):
        raise UsageError(f"--batch is {options.batch}; it must be divisible by {max(NODES)}")
    least = (warm_up_batches(options.workers) + options.workers + 2) * options.batch
    if options.count < least:
        raise UsageError(f"--count is {options.count}; --workers and --batch ask for {least}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEGs, at any depth")
    parser.add_argument(
        "--count",
        type=positive,
        default=2400,
        metavar="N",
        help="images of an epoch; the given ones are repeated (default 2400)",
    )
    parser.add_argument(
        "--mb_per_s", type=positive, default=100, metavar="N", help="of the wire (default 100)"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--peers", default="all", metavar="NAME,...", help=f"default all: {', '.join(PEERS)}; none"
    )
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default 2")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument("--endpoint", metavar="URL", help="an S3 server (default: starts moto)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rounds here")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process is told
    parser.add_argument("--pack", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
