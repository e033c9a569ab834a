#!/usr/bin/env python3
"""Kill the packer with SIGKILL at random moments, start it again, and compare every byte.

Each round packs a small ImageFolder with two workers, kills the packer, one of its workers, or all
at a random moment of the time that an undisturbed run takes, waits until all have ended, gives the
same command again, and compares the result with that of the undisturbed run: every file, hidden
ones too.

  python scripts/kill_pack.py --rounds 20
"""

import argparse
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))

from sharding.console import natural, positive
from sharding.errors import DataError, reports_errors

ROOT = Path(__file__).parents[1]
IMAGES = 4000
VICTIMS = ("packer", "worker", "all")


def make_images(folder: Path) -> None:
    """An ImageFolder of noise in five classes."""
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        buffer = BytesIO()
        noise = generator.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG")
        path = folder / "train" / f"class_{number % 5}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())


def start(source: Path, destination: Path) -> subprocess.Popen[bytes]:
    """The packer, leader of a process group of its own."""
    line = [sys.executable, "shard.py", "pack", str(source), str(destination)]
    line += ["--max_samples", "5", "--workers", "2"]
    return subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(packer: subprocess.Popen[bytes], victim: str) -> str:
    """Kill it and wait until nothing of it runs; says what was killed."""
    children = Path(f"/proc/{packer.pid}/task/{packer.pid}/children")
    workers = []
    with suppress(OSError):
        workers = [int(pid) for pid in children.read_text().split()]
    descriptors = []
    for pid in workers:
        with suppress(ProcessLookupError):
            descriptors.append(os.pidfd_open(pid))
    if victim == "worker" and not workers:
        victim = "packer"
    with suppress(ProcessLookupError):
        if victim == "all":
            os.killpg(packer.pid, signal.SIGKILL)
        else:
            os.kill(workers[0] if victim == "worker" else packer.pid, signal.SIGKILL)
    status = packer.wait()
    for descriptor in descriptors:
        if not select.select([descriptor], [], [], 30)[0]:
            raise DataError("a worker outlived its packer by 30 seconds")
        os.close(descriptor)
    return "nothing: it had ended" if status == 0 else victim


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Kill as often as asked; exit status 3 at the first difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=natural, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    moments = random.Random(options.seed)  # noqa: S311
    with tempfile.TemporaryDirectory(prefix="kill_pack_") as folder:
        work = Path(folder)
        make_images(work / "images")
        began = time.monotonic()
        if start(work / "images", work / "expected").wait():
            raise DataError("the undisturbed run failed; run it by hand")
        seconds = time.monotonic() - began
        expected = files_below(work / "expected")
        killed: Counter[str] = Counter()
        for number in range(options.rounds):
            destination = work / "out"
            packer = start(work / "images", destination)
            moment = moments.uniform(0, seconds)
            time.sleep(moment)
            killed[kill(packer, VICTIMS[number % 3])] += 1
            if start(work / "images", destination).wait():
                raise DataError(f"round {number}: the second start failed (killed at {moment} s)")
            found = files_below(destination)
            if found != expected:
                names = sorted(set(found) ^ set(expected)) or "their bytes"
                raise DataError(f"round {number}: killed at {moment} s, these differ: {names}")
            shutil.rmtree(destination)
    print(
        f"{options.rounds} rounds, a run takes {seconds:.2f} s; killed: "
        + ", ".join(f"{what} {times} times" for what, times in killed.items())
        + f"; {len(expected)} files the same each time, nothing else"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
