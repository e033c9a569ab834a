#!/usr/bin/env python3
"""Measure how soon the first batch comes, at the start of a run and after a resume.

Each measurement runs in a process of its own, which is timed from the moment it is ready (imports
done, also those of the server that forks workers; loader made, state loaded) to its first batch.
The work is that of scripts/bench_loader.py. Rounds are interleaved and medians count.

Local shards are cold: POSIX_FADV_DONTNEED takes them out of the page cache just before the clock
starts (what a device or a virtual machine's host keeps is out of reach). On S3 the node's cache is
an empty folder each time; the server is moto, on loopback, or that of an s3:// URL.

Reads and bytes until the first batch include what was made or fetched ahead by then. Local: system
calls that read, and what they read, of all processes together. S3: requests and bytes of the
answers, counted in one more round by a proxy that is in the way then and not timed.

webdataset skips ahead by reading: its time is that from the start of an iterator in as many
workers, each of which drops its part of half an epoch's samples without decoding them, to the first
batch after these.
"""
# ruff: noqa: PLC0415 (the process that packs forks, and must have no threads)

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.bench_s3_server is found

from scripts.bench_peers import PREFETCH, SIZE, transform
from scripts.bench_report import machine, progress, write_report
from scripts.bench_s3_server import (
    Meter,
    Server,
    environment,
    make_shards,
    wait_for_server,
)
from sharding.console import positive
from sharding.dataset import PackedSplit
from sharding.errors import UsageError, reports_errors
from tests.fault_proxy import BUCKET

EXAMPLE = """examples:
  python scripts/bench_resume.py --shards /data/imagenet-shards/train
  python scripts/bench_resume.py --images /data/imagenet/val --json resume.json
"""
SHARES = (0.0, 0.1, 0.5, 0.99)
"""Of an epoch, at which a run goes on; 0 is a fresh start."""
SKIPPED = 0.5
"""What webdataset drops."""
MAY_TAKE = 1.1
"""Times a fresh start."""
LEAST_BATCHES = 100
"""Of an epoch, so that there is one to come at 99%."""
SHARDS = 24
TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a process is told."""

    contender: str
    url: str
    """Of the split."""
    share: float
    cache: str
    """Folder for shards on S3."""
    workers: int
    batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class First:
    """What a process measured."""

    ready: float
    """time.perf_counter, which is the machine's."""
    seconds: float
    reads: int
    read_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is measured, in each round once."""

    place: str
    share: float
    contender: str = "shardstream"

    @property
    def title(self) -> str:
        """For people."""
        if self.contender != "shardstream":
            return f"{self.contender} skips ahead to {self.share:.0%}"
        return f"resume at {self.share:.0%}" if self.share else "fresh start"


def first_batch(task: Task) -> First:
    """What the process of a measurement does."""
    local = Path(task.url) if "://" not in task.url else None
    batches = _ours(task) if task.contender == "shardstream" else _webdataset(task)
    if local is not None:
        make_cold(path for path in local.iterdir() if path.is_file())
    reads, read_bytes = session_reads()
    ready = time.perf_counter()
    images = next(iter(batches))
    seconds = time.perf_counter() - ready
    assert tuple(images.shape) == (task.batch, SIZE, SIZE, 3), images.shape
    after = session_reads()
    return First(
        ready=ready, seconds=seconds, reads=after[0] - reads, read_bytes=after[1] - read_bytes
    )


def _ours(task: Task) -> Iterator[Any]:
    from loaders.augment import AugmentConfig
    from loaders.loader import StreamingLoader
    from loaders.order import OrderConfig
    from loaders.prefetch import CacheConfig
    from loaders.reader import ShardReader
    from loaders.topology import Topology

    split = PackedSplit.open(task.url)
    split.check_present()
    loader = StreamingLoader(
        ShardReader(split),
        order=OrderConfig(),
        augment=AugmentConfig(),
        topology=Topology(global_batch=task.batch),
        size=SIZE,
        workers=task.workers,
        prefetch=PREFETCH,
        cache=CacheConfig(folder=Path(task.cache), limit=10**12) if task.cache else None,
    )
    if step := int(task.share * len(loader)):
        loader.load_state_dict({**loader.state_dict(), "position": step * task.batch})
    wait_for_server()
    return (made.images for made in loader)


def _webdataset(task: Task) -> Iterator[Any]:
    import webdataset as wds

    manifest = PackedSplit.open(task.url).manifest
    drop = int(task.share * sum(shard.samples for shard in manifest.shards)) // task.workers

    def skip(samples: Iterable[Any]) -> Iterator[Any]:
        return islice(samples, drop, None)

    dataset = (
        wds.WebDataset([f"{task.url}/{shard.url}" for shard in manifest.shards], shardshuffle=False)
        .compose(skip)
        .decode("pil")
        .to_tuple("jpeg;jpg", "cls")
        .map_tuple(transform(), int)
        .batched(task.batch)
    )
    loader = wds.WebLoader(
        dataset, num_workers=task.workers, prefetch_factor=PREFETCH, batch_size=None
    )
    return (images for images, _ in loader)


def make_cold(paths: Iterable[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # only what is on the disk can go
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def session_reads() -> tuple[int, int]:
    """Reading system calls, and their bytes, of all living processes of this session."""
    reads = read_bytes = 0
    session = os.getsid(0)
    for path in Path("/proc").glob("[0-9]*/io"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(int(path.parent.name)) == session:
                values = dict(line.split(": ") for line in path.read_text().splitlines())
                reads += int(values["syscr"])
                read_bytes += int(values["rchar"])
    return reads, read_bytes


def measure(task: Task, endpoint: str) -> First:
    """One measurement in a process of its own. Raises ChildProcessError if that fails."""
    what = f"cannot measure {task.contender} on {task.url} at {task.share:.0%}"
    try:
        process = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(asdict(task))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment(endpoint),
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"{what}: not done in {error.timeout:g} s") from error
    if process.returncode:
        *_, last = process.stderr.strip().splitlines() or ["it ended without a word"]
        raise ChildProcessError(f"{what}: {last}")
    return First(**json.loads(process.stdout.splitlines()[-1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The rounds of one case."""

    case: Case
    seconds: float
    least: float
    most: float
    times_fresh: float
    reads: float
    read_mb: float


def summarize(measured: dict[Case, list[First]], counted: dict[Case, First]) -> list[Row]:
    """The rows of all cases, in their order; `counted` are those whose reads a proxy counted."""
    medians = {case: statistics.median(m.seconds for m in each) for case, each in measured.items()}
    rows = []
    for case, each in measured.items():
        reads = [counted[case]] if case in counted else each
        rows.append(
            Row(
                case=case,
                seconds=medians[case],
                least=min(m.seconds for m in each),
                most=max(m.seconds for m in each),
                times_fresh=medians[case] / medians[Case(place=case.place, share=0.0)],
                reads=statistics.median(m.reads for m in reads),
                read_mb=statistics.median(m.read_bytes for m in reads) / 1e6,
            )
        )
    return rows


def verdicts(rows: list[Row]) -> dict[str, str]:
    """Whether each resume is as fast as it must be: 'kept' or 'missed', by what it is."""
    return {
        f"{row.case.place}, {row.case.title}: at most {MAY_TAKE} x a fresh start": (
            f"{'kept' if row.times_fresh <= MAY_TAKE else 'missed'} ({row.times_fresh:.2f} x)"
        )
        for row in rows
        if row.case.share and row.case.contender == "shardstream"
    }


def table(rows: list[Row]) -> str:
    """The rows for people."""
    heads = ("first batch", "min", "max", "of fresh", "reads", "MB")
    lines = [f"{'':38}" + "".join(f"{head:>12}" for head in heads)]
    for row in rows:
        seconds = "".join(f"{value:10.3f} s" for value in (row.seconds, row.least, row.most))
        lines.append(
            f"{row.case.place + ', ' + row.case.title:38}{seconds}{row.times_fresh:10.2f} x"
            f"{row.reads:12,.0f}{row.read_mb:12.1f}"
        )
    return "\n".join(lines)


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Pack and upload if asked to, measure, print."""
    options = _options(arguments)
    if options.child:
        print(json.dumps(asdict(first_batch(Task(**json.loads(options.child))))))
        return 0
    if (options.images is None) == (options.shards is None):
        raise UsageError("give either --shards PATH_OR_URL or --images FOLDER")
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_resume_")))
        url = options.shards
        if url is None:
            url = str(make_shards(options.images, work, options.count, shards=SHARDS)[0])
        split = PackedSplit.open(url)
        samples = sum(shard.samples for shard in split.manifest.shards)
        if samples < (least := LEAST_BATCHES * options.batch):
            raise UsageError(
                f"{url} has {samples} samples; 99% of an epoch needs {least} at least: give more, "
                "or a smaller --batch"
            )
        if url.startswith("s3://"):
            places, endpoint = {"S3": url}, os.environ.get("AWS_ENDPOINT_URL", "")
        else:
            server = Server(None)
            stack.callback(server.clear)
            server.upload(Path(url), f"{work.name}/train")
            places = {"local": url, "S3": f"s3://{BUCKET}/{work.name}/train"}
            endpoint = server.endpoint
        load = [os.getloadavg()[0]]
        measured, counted = _rounds(options, places, work, endpoint)
        load.append(os.getloadavg()[0])
    rows, known = summarize(measured, counted), machine()
    print(
        f"{known['cpu']}, {known['cores']} cores, load {load[0]:.1f} before and {load[1]:.1f} "
        f"after; {samples} samples, {options.rounds} rounds, {options.workers} workers, batches of "
        f"{options.batch}; local files taken out of the page cache by posix_fadvise, S3 with an "
        "empty cache"
    )
    print(table(rows))
    found = verdicts(rows)
    for what, verdict in found.items():
        print(f"{what}: {verdict}")
    if options.json:
        write_report(
            options.json,
            load=load,
            summary=[asdict(row) for row in rows],
            must_hold=found,
            rounds=[asdict(case) | asdict(one) for case, each in measured.items() for one in each],
        )
    return 0


def _rounds(
    options: argparse.Namespace, places: dict[str, str], work: Path, endpoint: str
) -> tuple[dict[Case, list[First]], dict[Case, First]]:
    """Measure all cases once, then all once more, each time beginning with another one."""
    cases = [Case(place=place, share=share) for place in places for share in SHARES]
    if "local" in places:
        cases.append(Case(place="local", share=SKIPPED, contender="webdataset"))
    measured: dict[Case, list[First]] = {case: [] for case in cases}

    def task_of(case: Case, number: int) -> Task:
        return Task(
            contender=case.contender,
            url=places[case.place],
            share=case.share,
            cache="" if case.place == "local" else str(work / f"{number}-{case.share}"),
            workers=options.workers,
            batch=options.batch,
        )

    for number in range(options.rounds):
        turn = number % len(cases)
        for case in cases[turn:] + cases[:turn]:
            progress(f"round {number + 1} of {options.rounds}: {case.place}, {case.title}")
            measured[case].append(measure(task_of(case, number), endpoint))
    counted = {}
    for case in cases if endpoint else []:
        if case.place != "local":
            counted[case] = _count(task_of(case, options.rounds), endpoint)
    progress("")
    return measured, counted


def _count(task: Task, endpoint: str) -> First:
    """The requests until the first batch, which a proxy counts."""
    meter = Meter(endpoint)
    with meter:
        made = measure(task, meter.url)
    sizes = [size for when, size in meter.sent if made.ready <= when <= made.ready + made.seconds]
    asked = [when for when in meter.asked if made.ready <= when <= made.ready + made.seconds]
    return First(ready=made.ready, seconds=made.seconds, reads=len(asked), read_bytes=sum(sizes))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", metavar="PATH_OR_URL", help="a packed split; one that is local goes to moto too"
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="or photos to be packed")
    parser.add_argument(
        "--count",
        type=positive,
        default=6400,
        metavar="N",
        help="images to pack; the given ones are repeated (default 6400)",
    )
    parser.add_argument("--rounds", type=positive, default=9, metavar="N", help="default 9")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default 2")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rounds here")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process is told
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
