#!/usr/bin/env python3
"""Fuzz loaders._jpeg under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds the extension with the sanitizers, preloads their runtime into a child Python and gives it
mutated JPEGs (a folder's, or some made by Pillow) with random regions, scales, boxes and output
sizes. Three things are findings, printed with the input's file: the child dies or leaks, an input
takes longer than its limit, or a region differs from the same region of a whole decode. --libjpeg
names an installed libjpeg-turbo that was itself built with the sanitizers, to look inside it too.

Not atheris: its coverage guidance needs the extension compiled by clang; without it, it mutates as
blindly as this does.

  python scripts/fuzz_jpeg.py /data/imagenet/val --seconds 600
"""

import argparse
import faulthandler
import io
import math
import mmap
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).resolve().parent.parent / "loaders" / "_jpeg.c"
MAX_PIXELS = 2**19
SCRATCH_BYTES = 2**22
SANITIZERS = "-fsanitize=address,undefined"


def build(folder: Path, libjpeg: Path | None) -> None:
    """Compile _jpeg.c with the sanitizers as package `loaders` in folder."""
    package = folder / "loaders"
    package.mkdir()
    (package / "__init__.py").touch()
    output = package / f"_jpeg{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [
        "-shared",
        "-fPIC",
        "-O1",
        "-g",
        "-fno-omit-frame-pointer",
        SANITIZERS,
        "-fno-sanitize-recover=all",
    ]
    include = ["-I", sysconfig.get_path("include")]
    library = ["-ljpeg"]
    if libjpeg:
        include += ["-I", str(libjpeg / "include")]
        library = [str(libjpeg / "lib" / "libjpeg.a")]
    subprocess.run(["gcc", *flags, *include, str(SOURCE), "-o", str(output), *library], check=True)


def make_seeds() -> list[bytes]:
    """Make small JPEGs of several kinds with Pillow."""
    from PIL import Image  # noqa: PLC0415  (the parent process does without Pillow)

    seeds = []
    for mode in ("RGB", "L", "CMYK"):
        image = Image.effect_noise((75, 61), 90).convert(mode)
        for progressive in (False, True):
            for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
                for restart in (0, 2):
                    file = io.BytesIO()
                    image.save(
                        file,
                        "JPEG",
                        progressive=progressive,
                        subsampling=subsampling,
                        restart_marker_blocks=restart,
                    )
                    seeds.append(file.getvalue())
    return seeds


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage a JPEG in one to sixteen places, in its header more often than elsewhere."""
    damaged = bytearray(data)
    for _ in range(2 ** rng.randrange(5)):
        end = min(len(damaged), 700) if rng.random() < 0.6 else len(damaged)
        if end < 2:
            break
        at = rng.randrange(end)
        length = min(2 ** rng.randrange(10), len(damaged) - at)
        match rng.randrange(9):
            case 0 | 1:
                damaged[at] ^= 1 << rng.randrange(8)
            case 2 | 3:
                damaged[at] = rng.choice(
                    (0, 1, 0x11, 0x22, 0x41, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256))
                )
            case 4:
                damaged[at : at + 2] = bytes(
                    [0xFF, rng.choice((0xC0, 0xC2, 0xC4, 0xD0, 0xD7, 0xD9, 0xDA, 0xDB, 0xDD))]
                )
            case 5:
                del damaged[at : at + length]
            case 6:
                damaged[at:at] = damaged[at : at + length]
            case 7:
                start = rng.randrange(len(other))
                damaged[at : at + length] = other[start : start + length]
            case 8:
                del damaged[rng.randrange(len(damaged)) :]
    return bytes(damaged[: SCRATCH_BYTES - 8])


def try_one(rng: random.Random, jpeg: ModuleType, data: bytes) -> str:
    """Decode data at random settings and return what happened; anything unforeseen raises."""
    try:
        width, height, _, _ = jpeg.read_header(data)
        denom = rng.choice((1, 2, 4, 8))
        width, height = max(1, math.ceil(width / denom)), max(1, math.ceil(height / denom))
        left, top = rng.randrange(width), rng.randrange(height)
        right, bottom = rng.randrange(left, width) + 1, rng.randrange(top, height) + 1
        x0, x1 = rng.uniform(left, right), right
        y0, y1 = top, rng.uniform(top, bottom) + 1e-3
        size = rng.randrange(1, 80) * rng.randrange(1, 80) * 3
        rows = rng.choice([n for n in range(1, 80) if size % (3 * n) == 0])
        out = memoryview(bytearray(size)).cast("B", (rows, size // 3 // rows, 3))
        pixels = jpeg.decode_region(data, left, top, right, bottom, denom, max_pixels=MAX_PIXELS)
        jpeg.decode_resized(
            data, x0, y0, x1, min(y1, bottom), left, top, right, bottom, denom, out,
            rng.random() < 0.5, filter=rng.choice(("bilinear", "bicubic")), max_pixels=MAX_PIXELS,
        )  # fmt: skip
        whole = jpeg.decode_region(data, 0, 0, width, height, denom, max_pixels=MAX_PIXELS)
    except (jpeg.CorruptError, jpeg.UnsupportedError, jpeg.LimitError) as error:
        return type(error).__name__
    row = (right - left) * 3
    for y in range(top, bottom):
        start = (y * width + left) * 3
        if whole[start : start + row] != pixels[(y - top) * row : (y - top + 1) * row]:
            raise AssertionError(
                f"row {y} of {(left, top, right, bottom)} at 1/{denom} differs from a full decode"
            )
    return "decoded"


def work(options: argparse.Namespace) -> None:
    """Be the child: mutate and try until the time is over."""
    from loaders import _jpeg  # noqa: PLC0415  (built by the parent process)

    rng = random.Random(options.seed)  # noqa: S311  (no secret)
    seeds = (
        [path.read_bytes() for path in sorted(options.folder.rglob("*.[jJ][pP]*"))]
        if options.folder
        else make_seeds()
    )
    seeds = [seed for seed in seeds if len(seed) < SCRATCH_BYTES // 2]
    outcomes: Counter[str] = Counter()
    start = last = time.monotonic()
    with options.scratch.open("r+b") as file, mmap.mmap(file.fileno(), SCRATCH_BYTES) as scratch:
        while time.monotonic() - start < options.seconds:
            data = mutate(rng, rng.choice(seeds), rng.choice(seeds))
            scratch[:8] = len(data).to_bytes(8)
            scratch[8 : 8 + len(data)] = data
            faulthandler.dump_traceback_later(options.input_seconds, exit=True)
            outcomes[try_one(rng, _jpeg, data)] += 1
            faulthandler.cancel_dump_traceback_later()
            if time.monotonic() - last > 60:
                last = time.monotonic()
                print(
                    f"{last - start:6.0f} s: {outcomes.total()} executions, {dict(outcomes)}",
                    flush=True,
                )
    print(
        f"seed {options.seed}, {len(seeds)} files: {outcomes.total()} executions, {dict(outcomes)}",
        flush=True,
    )


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input_seconds", type=float, default=20)
    parser.add_argument("--libjpeg", type=Path)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Build, run the child and report; 1 if there is a finding."""
    options = parse_options()
    if options.scratch:
        work(options)
        return 0
    runtimes = [
        subprocess.run(
            ["gcc", f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, options.libjpeg)
        scratch = folder / "input"
        scratch.write_bytes(bytes(SCRATCH_BYTES))
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtimes),
            "PYTHONPATH": str(folder),
            "PYTHONMALLOC": "malloc",
            # Python itself leaks at exit, so leaks do not decide the exit status: ours are shown.
            "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"
            ":max_allocation_size_mb=2048",
            "LSAN_OPTIONS": "exitcode=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--scratch", str(scratch)],
            env=environment, stderr=subprocess.PIPE, text=True, errors="replace", check=False,
        )  # fmt: skip
        blocks = child.stderr.split("\n\n")
        leaks = [
            block
            for block in blocks
            if "leak of" in block and ("jpeg" in block.replace("fuzz_jpeg", ""))
        ]
        if child.returncode == 0 and not leaks:
            print("no finding")
            return 0
        data = scratch.read_bytes()
        finding = Path(f"finding-{options.seed}.jpg").resolve()
        finding.write_bytes(data[8 : 8 + int.from_bytes(data[:8])])
        print(f"FINDING (exit status {child.returncode}, {len(leaks)} leaks), input {finding}:")
        print("\n\n".join(leaks) or child.stderr[-6000:])
        return 1


if __name__ == "__main__":
    sys.exit(main())
