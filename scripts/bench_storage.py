#!/usr/bin/env python3
"""Measure what a network file system costs: an ImageFolder against shards, at the same decode work.

The slow file system is simulated by scripts/slow_storage.c, a library that makes each open, each
stat by name and, in a second table, each read of the data last longer. It does not delay mmap, nor
fstat and directory listings; it does delay reads that the page cache holds.

The work: random-resized crop to 224 and flip by the region decoder, StreamingLoader's whole batches
in the main process. Each measurement runs in a process of its own, from opening the data to the end
of the first epoch. Its first batches, which may have been made ahead, are not counted. One lane and
a small window let a shard be opened for each 128 MB that is counted, as it is in a long epoch. The
library counts what it delays, in all processes: those figures stand beside the rates.

Rounds are interleaved and medians count; ratios are to the same format without any delay. Where
others use the machine too, `best`, the ratio of the fastest rounds, tells more.
"""

import argparse
import contextlib
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.bench_peers is found

from scripts.bench_loader import make_photos
from scripts.bench_peers import PREFETCH, ROOT, SIZE, warm_up_batches
from scripts.bench_process import environment
from scripts.bench_report import machine, progress, write_report
from sharding.console import picture, positive
from sharding.errors import DataError, UsageError, reports_errors

EXAMPLE = """example:
  python scripts/bench_storage.py --images /data/imagenet/val --json out.json --plot out.png
"""
FORMATS = {"imagefolder": "photos", "shards": "shards"}
"""Name of a format, and of its folder in the data's."""
MUST_KEEP = {False: 0.97, True: 0.95}
"""Share of their speed that shards must keep at the longest delay; True: with slow reads."""
COUNTERS = struct.Struct("4Q")
TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A format on a storage so slow."""

    format: str
    open_ms: float
    """For each open and each stat."""
    read_ms: float

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.format}, {self.open_ms:g} ms an open, {self.read_ms:g} ms a read"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one process measured; the counts are those of the seconds."""

    images: int
    seconds: float
    first_batch_seconds: float
    """From opening the data, a listing of all files for an ImageFolder, to the first batch."""
    opens: int
    stats: int
    reads: int
    slept_ns: int

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The rounds of one case."""

    case: Case
    median: float
    """Images a second."""
    least: float
    most: float
    kept: float
    """Share of the same format's rate without delays."""
    kept_best: float
    """The same of the fastest rounds."""
    first_batch_seconds: float
    opens: float
    """For each image."""
    reads: float


def compile_library(out: Path) -> None:
    """Make the library that slows a process down. Raises UsageError without a C compiler."""
    if sys.platform != "linux":
        raise UsageError("slow storage is simulated by LD_PRELOAD, on Linux only")
    source = ROOT / "scripts" / "slow_storage.c"
    command = ["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(out), "-ldl"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UsageError(
            "there is no C compiler `cc` to build scripts/slow_storage.c with; install one "
            "(Debian: apt-get install gcc libc6-dev)"
        ) from error
    if made.returncode:
        raise UsageError(f"cc cannot build {source}: {made.stderr.strip().splitlines()[0]}")


def slow_environment(library: Path, prefix: Path, case: Case, counts: Path) -> dict[str, str]:
    """What a process, and all that it starts, is slowed down by. `counts` is made anew."""
    counts.write_bytes(bytes(COUNTERS.size))
    before = os.environ.get("LD_PRELOAD")
    return {
        "LD_PRELOAD": f"{library}:{before}" if before else str(library),
        "SLOW_STORAGE_PREFIX": str(prefix.resolve()),
        "SLOW_STORAGE_OPEN_US": str(round(case.open_ms * 1000)),
        "SLOW_STORAGE_READ_US": str(round(case.read_ms * 1000)),
        "SLOW_STORAGE_COUNTS": str(counts),
    }


def measure(case: Case, work: Path, library: Path, *, workers: int, batch: int) -> Measurement:
    """One epoch of WORK/data in a process of its own. Raises ChildProcessError if that fails."""
    data = (work / "data").resolve()
    try:
        process = subprocess.run(
            [sys.executable, __file__, "--child", case.format, str(data), str(workers), str(batch)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment() | slow_environment(library, data, case, work / "counts"),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(
            f"cannot measure {case.title}: not done in {error.timeout:g} s; use a smaller --count"
        ) from error
    if process.returncode:
        *_, last = process.stderr.strip().splitlines() or ["it ended without a word"]
        raise ChildProcessError(f"cannot measure {case.title}: {last}")
    if not any(COUNTERS.unpack((work / "counts").read_bytes())):
        raise ChildProcessError(f"cannot measure {case.title}: {library} was not loaded")
    return Measurement(**json.loads(process.stdout.splitlines()[-1]))


def iterate(name: str, data: Path, *, workers: int, batch: int) -> Measurement:
    """What the process of a measurement does."""
    # Not before: the process that packs forks, and must have no threads.
    from loaders.augment import AugmentConfig  # noqa: PLC0415
    from loaders.imagefolder import FolderReader  # noqa: PLC0415
    from loaders.loader import StreamingLoader  # noqa: PLC0415
    from loaders.order import OrderConfig  # noqa: PLC0415
    from loaders.reader import Reader, ShardReader  # noqa: PLC0415
    from loaders.topology import Topology  # noqa: PLC0415
    from sharding.dataset import PackedSplit  # noqa: PLC0415
    from sharding.manifest import Packing  # noqa: PLC0415
    from sharding.source import scan  # noqa: PLC0415

    def open_reader() -> Reader:
        """As loaders.datamodule does, which would import Lightning for it."""
        folder = data / FORMATS[name] / "train"
        if name == "imagefolder":
            return FolderReader(scan(folder), Packing())
        split = PackedSplit.open(str(folder))
        split.check_present()
        return ShardReader(split)

    begin = time.perf_counter()
    loader = StreamingLoader(
        open_reader(),
        order=OrderConfig(lanes=1, window=batch),
        augment=AugmentConfig(),
        topology=Topology(global_batch=batch),
        size=SIZE,
        workers=workers,
        prefetch=PREFETCH,
        decoder="region",
    )
    skip = warm_up_batches(workers)
    counts = Path(os.environ["SLOW_STORAGE_COUNTS"])
    first = start = 0.0
    before: tuple[int, ...] = ()
    for number, _ in enumerate(loader, 1):
        if number == 1:
            first = time.perf_counter()
        if number == skip:
            before, start = COUNTERS.unpack(counts.read_bytes()), time.perf_counter()
    seconds = time.perf_counter() - start
    after = COUNTERS.unpack(counts.read_bytes())
    opens, stats, reads, slept_ns = (b - a for a, b in zip(before, after, strict=True))
    return Measurement(
        images=(len(loader) - skip) * batch,
        seconds=seconds,
        first_batch_seconds=first - begin,
        opens=opens,
        stats=stats,
        reads=reads,
        slept_ns=slept_ns,
    )


def make_data(images: Path, work: Path, count: int) -> int:
    """WORK/data: an ImageFolder of `count` photos, and its shards. Returns how many there were."""
    from sharding.manifest import Packing  # noqa: PLC0415  (see iterate)
    from sharding.pack import Job, pack  # noqa: PLC0415
    from sharding.source import scan  # noqa: PLC0415
    from sharding.store import LocalStore  # noqa: PLC0415

    found = (path for path in images.rglob("*") if path.is_file())
    sources = sorted(path for path in found if path.suffix.lower() in {".jpg", ".jpeg"})
    if not sources:
        raise DataError(f"--images {images}: no *.jpg or *.jpeg in it")
    make_photos(sources, work / "data", max(count, len(sources)))
    job = Job(
        listing=scan(work / "data" / "photos" / "train"),
        store=LocalStore(work / "data" / "shards" / "train"),
        split="train",
        packing=Packing(),
    )
    pack(job, workers=1)
    return len(sources)


def summarize(measured: dict[Case, list[Measurement]]) -> list[Row]:
    """The rows of all cases, in their order."""
    medians = {case: statistics.median(m.rate for m in each) for case, each in measured.items()}
    best = {case: max(m.rate for m in each) for case, each in measured.items()}
    base = {case: Case(format=case.format, open_ms=0, read_ms=0) for case in measured}
    return [
        Row(
            case=case,
            median=medians[case],
            least=min(m.rate for m in each),
            most=best[case],
            kept=medians[case] / medians[base[case]],
            kept_best=best[case] / best[base[case]],
            first_batch_seconds=statistics.median(m.first_batch_seconds for m in each),
            opens=statistics.median(m.opens / m.images for m in each),
            reads=statistics.median(m.reads / m.images for m in each),
        )
        for case, each in measured.items()
    ]


def verdicts(rows: list[Row]) -> dict[str, str]:
    """What must hold of shards at the longest delay: 'kept' or 'missed', by what it is."""
    found = {}
    for slow_reads, least in MUST_KEEP.items():
        shards = [
            row
            for row in rows
            if row.case.format == "shards" and (row.case.read_ms > 0) is slow_reads
        ]
        if shards:
            row = max(shards, key=lambda row: row.case.open_ms)
            what = f"{row.case.title}: at least {least:.0%} of the speed without delays"
            found[what] = (
                f"{'kept' if row.kept >= least else 'missed'} ({row.kept:.1%}, fastest rounds "
                f"{row.kept_best:.1%})"
            )
    return found


def tables(rows: list[Row]) -> str:
    """A table for each delay of reads."""
    head = ("ms an open", "images/s", "min", "max", "kept", "best", "first batch", "opens", "reads")
    lines = []
    for read_ms in sorted({row.case.read_ms for row in rows}):
        lines.append(f"{read_ms:g} ms a read; opens and reads of each image")
        lines.append(f"  {'':12}" + "".join(f"{title:>12}" for title in head))
        for row in (row for row in rows if row.case.read_ms == read_ms):
            rates = "".join(f"{rate:12,.0f}" for rate in (row.median, row.least, row.most))
            lines.append(
                f"  {row.case.format:12}{row.case.open_ms:12g}{rates}{row.kept:12.1%}"
                f"{row.kept_best:12.1%}{row.first_batch_seconds:10.1f} s{row.opens:12.4f}"
                f"{row.reads:12.3f}"
            )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Images a second over the delay of opens; dashed with slow reads."""
    import matplotlib as mpl  # noqa: PLC0415  (an extra)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, read_ms in dict.fromkeys((row.case.format, row.case.read_ms) for row in rows):
        line = [row for row in rows if (row.case.format, row.case.read_ms) == (name, read_ms)]
        spread = [[r.median - r.least for r in line], [r.most - r.median for r in line]]
        axes.errorbar(
            [row.case.open_ms for row in line],
            [row.median for row in line],
            yerr=spread,
            marker="o",
            capsize=3,
            linestyle="--" if read_ms else "-",
            color="tab:orange" if name == "shards" else "tab:gray",
            label=f"{name}, {read_ms:g} ms a read" if read_ms else name,
        )
    axes.set_xlabel("ms added to each open and stat")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Pack, measure, print."""
    options = _options(arguments)
    if options.child:
        name, data, workers, batch = options.child
        made = iterate(name, Path(data), workers=int(workers), batch=int(batch))
        print(json.dumps(asdict(made)))
        return 0
    _check(options)
    with contextlib.ExitStack() as stack:
        if options.work is None:
            options.work = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_storage_"))
        work = Path(options.work).absolute()
        if work.exists() and any(work.iterdir()):
            raise UsageError(f"--work {work} is not empty")
        work.mkdir(parents=True, exist_ok=True)
        library = work / "slow_storage.so"
        compile_library(library)
        photos = make_data(options.images, work, options.count)
        load = [os.getloadavg()[0]]
        measured = _rounds(options, work, library)
        load.append(os.getloadavg()[0])
    rows, known = summarize(measured), machine()
    print(
        f"{known['cpu']}, {known['cores']} cores, load {load[0]:.1f} before and {load[1]:.1f} "
        f"after; {photos} photos, {options.rounds} rounds of {options.count}, {options.workers} "
        f"workers"
    )
    print(tables(rows))
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
    if options.plot:
        plot(rows, options.plot)
    return 0


def _rounds(
    options: argparse.Namespace, work: Path, library: Path
) -> dict[Case, list[Measurement]]:
    """Measure all cases once, then all once more, each time beginning with another one."""
    cases = [
        Case(format=name, open_ms=open_ms, read_ms=read_ms)
        for read_ms in dict.fromkeys((0.0, options.read_ms))
        for name in options.formats
        for open_ms in options.delays
    ]
    measured: dict[Case, list[Measurement]] = {case: [] for case in cases}
    for number in range(options.rounds):
        turn = number % len(cases)
        for case in cases[turn:] + cases[:turn]:
            progress(f"round {number + 1} of {options.rounds}: {case.title}")
            made = measure(case, work, library, workers=options.workers, batch=options.batch)
            measured[case].append(made)
    progress("")
    return measured


def _check(options: argparse.Namespace) -> None:
    """Find before the packing what cannot be measured."""
    from loaders.decode import get_decoder  # noqa: PLC0415  (see iterate)

    if options.images is None:
        raise UsageError("give --images FOLDER, photographs at any depth")
    least = (warm_up_batches(options.workers) + 2) * options.batch
    if options.count < least:
        raise UsageError(f"--count is {options.count}; --workers and --batch ask for {least}")
    try:
        get_decoder("region")
    except ValueError as error:
        raise UsageError(str(error)) from error


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no delay of 0 to 1000 milliseconds")
    return value


def _delays(text: str) -> list[float]:
    """Always with 0, which the others are compared with."""
    return sorted({0.0, *map(_milliseconds, text.split(","))})


def _formats(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - FORMATS.keys():
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}? There are {', '.join(FORMATS)}"
        )
    return [name for name in FORMATS if name in chosen]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEGs, at any depth")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--formats", type=_formats, default=[*FORMATS], metavar="NAME,...", help="default: both"
    )
    parser.add_argument(
        "--delays",
        type=_delays,
        default=[0.0, 1.0, 2.0, 5.0],
        metavar="MS,...",
        help="of each open and stat (default 0,1,2,5)",
    )
    parser.add_argument(
        "--read_ms",
        type=_milliseconds,
        default=1.0,
        metavar="MS",
        help="of each read, in the second table (default 1; 0: no second table)",
    )
    parser.add_argument(
        "--count",
        type=positive,
        default=3000,
        metavar="N",
        help="images of an epoch, at least; the given ones are repeated (default 3000)",
    )
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default 2")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument("--work", metavar="DIR", help="an empty folder (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rounds here")
    parser.add_argument("--plot", type=picture, metavar="PNG", help="draw the tables here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)  # what a process is told
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
