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

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.bench_peers is found

from scripts.bench_peers import warm_up_batches
from scripts.bench_process import MissingError, Runner, command, run_to_end
from scripts.bench_report import machine, progress, write_report
from scripts.bench_s3_peers import CONTENDERS, PEERS, Epoch, Task
from scripts.bench_s3_server import (
    QUIET_SECONDS,
    Meter,
    Server,
    environment,
    make_shards,
)
from sharding.console import positive
from sharding.errors import UsageError, reports_errors

EXAMPLE = """examples:
  python scripts/bench_s3.py --images /data/imagenet/val --json s3.json
  python scripts/bench_s3.py --images /data/imagenet/val --peers none --mb_per_s 100
"""
SHARDS = 24  # at least
SHARD_IMAGES = 100  # at most; moto copies a whole shard for each range of it
NODES = (1, 4)
MAY_WAIT = 0.05
"""Share of the time that workers may wait beyond what the wire makes them."""
MAY_READ = 1.05
"""Times the data set that all nodes together may read in the first epoch."""


def start(task: Task) -> Runner:
    """The process that a contender runs in. Raises MissingError if it does not start."""
    folder = Path(task.folder)
    folder.mkdir()
    venv = CONTENDERS[task.contender].venv
    return Runner(
        command("bench_s3_peers", venv, "serve", json.dumps(asdict(task)), required=True),
        folder=folder,
        log=folder.with_suffix(".log"),
        environ=environment(task.endpoint),
    )


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
            progress(f"round {number + 1} of {options.rounds}: {name}")
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
    shard_bytes = max(path.stat().st_size for path in _tars(work))
    line = command(
        "bench_s3_peers", contender.venv, "pack", name, str(work), str(shard_bytes), required=True
    )
    run_to_end(line, folder=work, log=work / f"pack-{name}.log")
    server.upload(work / name, f"{work.name}/{name}")
    shutil.rmtree(work / name)


def measure(task: Task, server: Server) -> tuple[Round, dict[str, str]]:
    """Two epochs in a new process, and its versions."""
    runner = start(task)
    try:
        cpu = server.cpu_seconds()
        first = Epoch(**runner.ask(0))
        cpu = server.cpu_seconds() - cpu
        _wait_until_full(Path(task.folder))
        second = Epoch(**runner.ask(1))
    finally:
        runner.close()
    return Round(contender=task.contender, first=first, second=second, server_cpu=cpu), (
        runner.facts
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
            runner = start(task)
            try:
                epochs.append(Epoch(**runner.ask(0)))
                meter.settle()
                read_bytes += sum(size for _, size in meter.sent)
                before = meter.reads()
                second_rates.append(Epoch(**runner.ask(1)).rate)
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
    _check(options)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_s3_")))
        shards, sources = make_shards(
            options.images, work, options.count, shards=max(SHARDS, options.count // SHARD_IMAGES)
        )
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
                progress(f"round {number + 1} of {options.rounds}: {nodes} nodes, slow wire")
                try:
                    made = measure_slow(nodes, number, work, server.endpoint, options)
                except MissingError as error:
                    raise ChildProcessError(f"cannot measure ours: {error}") from error
                slow[nodes].append(made)
        progress("")
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
        write_report(
            options.json,
            load=load,
            server=server.title,
            versions=versions,
            summary=rows,
            missing=missing,
            must_hold=must_hold,
            rounds=[asdict(one) for one in rounds],
            slow=[asdict(one) for each in slow.values() for one in each],
        )
    return 0


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
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
