#!/usr/bin/env python3
"""Measure training data from S3: our loader beside its peers, and behind a slow wire.

The work is that of scripts/bench_loader.py: random-resized crop to 224 and flip, uint8 out, whole
batches delivered to the main process. The photos are packed in each contender's own format, in
shards of equal size, and put on one server: moto's on loopback, or --endpoint. Rounds are
interleaved; in each, a contender runs in a new process with an empty cache of its own. It iterates
an epoch, waits until it asks nothing more of the server, and iterates another one. "images/s" is
from the delivery of batch K to that of the last (K = 2 x workers x prefetch + 2), "whole" from the
moment the first batch is asked for.

The second part is bench_s3_slow.py's: ours alone, for one node and for four, behind a slow wire.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.bench_peers is found

from scripts.bench_peers import warm_up_batches
from scripts.bench_process import MissingError, command, run_to_end
from scripts.bench_report import machine, progress, write_report
from scripts.bench_s3_peers import CONTENDERS, PEERS, Epoch, Task, start
from scripts.bench_s3_server import QUIET_S, Server, make_shards, tars
from scripts.bench_s3_slow import NODES, Slow, measure_slow, slow_line
from sharding.console import positive
from sharding.errors import UsageError, reports_errors

EXAMPLE = """examples:
  python scripts/bench_s3.py --images /data/imagenet/val --json s3.json
  python scripts/bench_s3.py --images /data/imagenet/val --peers none --mb_per_s 100
"""
SHARDS = 24  # at least
SHARD_IMAGES = 100  # at most; moto copies a whole shard for each range of it


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
    shard_bytes = max(path.stat().st_size for path in tars(work))
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
        time.sleep(QUIET_S)


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
        names = [path.name for path in tars(work)]
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
