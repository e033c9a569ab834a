"""What every benchmark says while it runs, and writes down beside its figures."""

import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor, and how many cores of it this process may use."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "cores": cores, "system": platform.platform()}


def write_report(path: Path, *, load: Sequence[float] = (), **parts: Any) -> None:
    """Write the parts as JSON, after the command and the machine; load: before and after."""
    known = machine() | ({"load_average": list(load)} if load else {})
    result = {"command": shlex.join(sys.argv), "machine": known, **parts}
    path.write_text(json.dumps(result, indent=1) + "\n")


def progress(text: str) -> None:
    """Show where it is, on a terminal; "" clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
