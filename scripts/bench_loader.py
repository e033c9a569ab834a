#!/usr/bin/env python3
"""Measure our loader and its peers on the same images, in the same sitting.

The work: random-resized crop to 224 (scale 0.08-1, ratio 3/4-4/3) and horizontal flip, uint8 out,
whole batches delivered to the main process. The images are packed in each contender's own format.
Each contender runs in a process of its own, with its own interpreter (scripts/bench_setup.sh
installs the peers), which lives through all rounds and sleeps on its standard input between them.
Rounds are interleaved: each contender iterates one epoch, then the next one does. A first epoch of
each warms up and is not counted.

Work that was made ahead while a contender slept does not count: a round's time is that from the
delivery of batch K to that of the last, K = 2 x workers x prefetch + 2 being more than any of them
makes ahead, and its images are those of the batches after K. A round's last batches find a peer's
queue running empty, ours filled for the next epoch: that is a small gift to the peers.

The bare limit is a C loop that decodes the regions that our loader decodes, in as many threads, and
does nothing else: no reading, check, resize, or delivery.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.bench_peers is found

from scripts.bench_peers import (
    CONTENDERS,
    FORMATS,
    PREFETCH,
    SIZE,
    warm_up_batches,
)
from scripts.bench_process import MissingError, Runner, command, environment, run_to_end
from scripts.bench_report import machine, progress, write_report
from sharding.console import natural, picture, positive
from sharding.errors import DataError, UsageError, reports_errors

EXAMPLE = """examples:
  python scripts/bench_loader.py --images /data/imagenet/val --json results.json --plot results.png
  python scripts/bench_loader.py --synthetic 300 --peers torchvision,webdataset --workers 2
"""
CLASSES = 10
SYNTHETIC_SIZE = (500, 375)
SYNTHETIC_BYTES = 110_000
PAUSE_S = 0.5  # in which the workers of the last contender fill their queues


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One epoch of one contender."""

    contender: str
    workers: int
    round: int
    images: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


def pack(name: str, work: Path) -> None:
    """Make the photos' format of this name, and what it is made of. Raises MissingError."""
    form = FORMATS[name]
    if (work / name).exists():
        return
    if form.needs:
        pack(form.needs, work)
    line = command("bench_peers", form.venv, "pack", name, str(work))
    run_to_end(line, folder=work, log=work / f"pack-{name}.log")


def start(name: str, work: Path, batch: int) -> Runner:
    """A contender that is ready to iterate its packed photos. Raises MissingError."""
    return Runner(
        command("bench_peers", CONTENDERS[name].venv, "serve", name, str(work), str(batch)),
        folder=work,
        log=work / f"{name}.log",
        environ=environment(),
    )


def synthetic_photos(folder: Path, count: int) -> Iterator[Path]:
    """Write `count` photo-like JPEGs: 1/f noise, as natural images have it, about 110 KB each."""
    generator = np.random.default_rng(0)
    sizes = {}
    first = _noise(generator)
    for quality in range(40, 100, 2):
        sizes[quality] = abs(len(_jpeg(first, quality)) - SYNTHETIC_BYTES)
    best = min(sizes, key=sizes.__getitem__)
    for number in range(count):
        path = folder / f"{number:06d}.JPEG"
        path.write_bytes(_jpeg(_noise(generator), best))
        yield path


def _noise(generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """An image whose amplitudes fall with 1/frequency; colours vary less than brightness."""
    width, height = SYNTHETIC_SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(generator.standard_normal((3, height, width)))
    luma, *chroma = np.fft.irfft2(white / frequency, (height, width))
    luma *= 55 / luma.std()
    blue, red = (plane * (12 / plane.std()) for plane in chroma)
    pixels = np.stack([luma + red, luma - (blue + red) / 2, luma + blue], axis=-1) + 118
    image: npt.NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    return image


def _jpeg(pixels: npt.NDArray[np.uint8], quality: int) -> bytes:
    output = BytesIO()
    Image.fromarray(pixels).save(output, "JPEG", quality=quality)
    return output.getvalue()


def make_photos(sources: list[Path], work: Path, count: int) -> None:
    """An ImageFolder WORK/photos of `count` images: hard links to the given ones, in turn."""
    for number in range(count):
        source = sources[number % len(sources)]
        target = work / "photos" / "train" / f"class_{number % CLASSES}" / f"{number:07d}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:  # another file system
            shutil.copyfile(source, target)


def measure(
    names: list[str], work: Path, options: argparse.Namespace
) -> tuple[list[Round], dict[str, dict[str, Any]], dict[str, str]]:
    """Return (all rounds, versions of each contender, why contenders are missing)."""
    runners: dict[str, Runner] = {}
    missing: dict[str, str] = {}
    rounds: list[Round] = []

    def attempt(name: str, workers: int, number: int) -> None:
        """Round 0 starts a contender and warms it up."""
        if name in missing:
            return
        try:
            if name not in runners:
                if form := CONTENDERS[name].format:
                    progress(f"pack {form}")
                    pack(form, work)
                runners[name] = start(name, work, options.batch)
            progress(f"round {number} of {options.rounds}: {name}, {workers} workers")
            time.sleep(PAUSE_S)
            answer = runners[name].ask(workers, number)
            images, seconds = answer["images"], answer["seconds"]
        except MissingError as error:
            missing[name] = str(error)
            rounds[:] = [other for other in rounds if other.contender != name]
            return
        if number:
            made = Round(
                contender=name, workers=workers, round=number, images=images, seconds=seconds
            )
            rounds.append(made)

    cases = [(name, workers) for name in names for workers in options.workers]
    try:
        for number in range(options.rounds + 1):
            turn = number % len(cases)  # so that no contender always follows the same one
            for name, workers in cases[turn:] + cases[:turn]:
                attempt(name, workers, number)
    finally:
        for runner in runners.values():
            runner.close()
        progress("")
    return rounds, {name: runner.facts for name, runner in runners.items()}, missing


def summarize(rounds: list[Round], names: list[str]) -> list[dict[str, Any]]:
    """One row for each contender and number of workers, with what is to be said of it.

    ours: times that ours, on the same images, is as fast. of_bare: share of the bare limit.
    scaling: times one worker's rate.
    """
    rates: dict[tuple[str, int], list[float]] = {}
    for one in rounds:
        rates.setdefault((one.contender, one.workers), []).append(one.rate)
    medians = {case: statistics.median(each) for case, each in rates.items()}

    def ratio(one: tuple[str, int], other: tuple[str, int]) -> float | None:
        return medians[one] / medians[other] if {one, other} <= medians.keys() else None

    rows = []
    for name, workers in sorted(rates, key=lambda case: (case[1], names.index(case[0]))):
        rival, case = CONTENDERS[name].rival, (name, workers)
        rows.append(
            {
                "contender": name,
                "workers": workers,
                "median": medians[case],
                "min": min(rates[case]),
                "max": max(rates[case]),
                "ours": None if rival in {"", name} else ratio((rival, workers), case),
                "of_bare": ratio(case, ("bare", workers)) if name == "ours" else None,
                "scaling": ratio(case, (name, 1)) if workers > 1 else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], missing: dict[str, str]) -> str:
    """The rows for people; a dash where there is nothing to say."""
    head = ("images/s", "workers", "median", "min", "max", "ours is", "of bare", "scaling")
    lines = [f"{head[0]:34s}" + "".join(f"{title:>9s}" for title in head[1:])]
    for row in rows:
        ours = f"{row['ours']:.2f} x" if row["ours"] else "-"
        bare = f"{row['of_bare']:.0%}" if row["of_bare"] else "-"
        scaling = f"{row['scaling']:.2f} x" if row["scaling"] else "-"
        rates = "".join(f"{row[key]:9,.0f}" for key in ("median", "min", "max"))
        title = CONTENDERS[row["contender"]].title
        lines.append(f"{title:34s}{row['workers']:9d}{rates}{ours:>9s}{bare:>9s}{scaling:>9s}")
    lines += [
        f"{CONTENDERS[name].title:34s}  missing: {reason}" for name, reason in missing.items()
    ]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Horizontal bars, the lines on them from the slowest to the fastest round."""
    import matplotlib as mpl  # noqa: PLC0415 (an extra)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    counts = sorted({row["workers"] for row in rows})
    order = {row["contender"]: row["median"] for row in rows}
    names = sorted(order, key=order.__getitem__)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.45 * len(names)), layout="constrained")
    thickness = 0.8 / len(counts)
    for row in rows:
        ours = row["contender"].startswith("ours")
        nth = counts.index(row["workers"])
        axes.barh(
            names.index(row["contender"]) + (nth - (len(counts) - 1) / 2) * thickness,
            row["median"],
            thickness * 0.92,
            xerr=[[row["median"] - row["min"]], [row["max"] - row["median"]]],
            color="tab:orange" if ours else "tab:gray",
            alpha=(nth + 1) / len(counts),
            error_kw={"elinewidth": 0.8},
        )
    axes.set_yticks(range(len(names)), [CONTENDERS[name].title for name in names])
    axes.set_xlabel(f"images/s with {', '.join(map(str, counts))} workers (pale to full)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Pack, measure, print."""
    options = _options(arguments)
    names = _names(options.peers)
    slowest_start = warm_up_batches(max(options.workers)) + max(options.workers)
    if options.count < (least := (slowest_start + 2) * options.batch):
        raise UsageError(f"--count is {options.count}; --workers and --batch ask for {least}")
    with contextlib.ExitStack() as stack:
        if options.work is None:
            options.work = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_loader_"))
        work = Path(options.work).absolute()
        if work.exists() and any(work.iterdir()):
            raise UsageError(f"--work {work} is not empty")
        (work / "synthetic").mkdir(parents=True)
        if options.images is None:
            sources = list(synthetic_photos(work / "synthetic", options.synthetic))
        else:
            found = (path for path in Path(options.images).rglob("*") if path.is_file())
            sources = sorted(path for path in found if path.suffix.lower() in {".jpg", ".jpeg"})
            if not sources:
                raise DataError(f"--images {options.images}: no *.jpg or *.jpeg in it")
        make_photos(sources, work, max(options.count, len(sources)))
        rounds, versions, missing = measure(names, work, options)
    rows = summarize(rounds, names)
    known = machine()
    print(f"{known['cpu']}, {known['cores']} cores; {len(sources)} images, {options.rounds} rounds")
    print(table(rows, missing))
    if options.json:
        write_report(
            Path(options.json),
            versions=versions,
            work={"images": len(sources), "batch": options.batch, "size": SIZE},
            prefetch=PREFETCH,
            rounds=[
                {key: getattr(one, key) for key in Round.__slots__} | {"images_per_s": one.rate}
                for one in rounds
            ],
            summary=rows,
            missing=missing,
        )
    if options.plot and rows:
        plot(rows, options.plot)
    return 0


def _names(peers: str) -> list[str]:
    """The contenders to measure: ours and the bare limit always."""
    if peers == "all":
        return list(CONTENDERS)
    chosen = set(peers.split(","))
    if unknown := chosen - CONTENDERS.keys():
        raise UsageError(
            f"--peers: {', '.join(sorted(unknown))}? There are {', '.join(CONTENDERS)}"
        )
    chosen |= {"ours", "bare"}
    chosen |= {CONTENDERS[name].rival for name in chosen} - {""}
    return [name for name in CONTENDERS if name in chosen]


def _counts(text: str) -> list[int]:
    return sorted({positive(part) for part in text.split(",")})


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", metavar="FOLDER", help="JPEGs, at any depth")
    images.add_argument("--synthetic", type=positive, metavar="N", help="make N photo-like JPEGs")
    parser.add_argument(
        "--peers", default="all", metavar="NAME,...", help=f"default all: {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--workers", type=_counts, default=[1, 2], metavar="N,...", help="1,2")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="default 5")
    parser.add_argument(
        "--count",
        type=natural,
        default=3000,
        metavar="N",
        help="images of an epoch, at least; the given ones are repeated (default 3000)",
    )
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument("--work", metavar="DIR", help="an empty folder (default: temporary)")
    parser.add_argument("--json", metavar="OUT", help="write all rounds and versions here")
    parser.add_argument("--plot", type=picture, metavar="PNG", help="draw the table here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
