"""Small ImageFolders of real images, data sets packed of them, and shard.py run as users do."""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sharding.dataset import PackedSplit
from sharding.manifest import Packing
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore

SHARD_PY = (sys.executable, str(Path(__file__).parents[1] / "shard.py"))
# A test must not hang on how Python is set up where the tests run (PYTHONUNBUFFERED hides errors).
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def image(
    number: int,
    kind: str = "JPEG",
    *,
    mode: str = "RGB",
    size: tuple[int, int] = (12, 9),
    **options: Any,
) -> bytes:
    """An image of noise as a file's bytes, another one for each number; size is (width, height)."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by their relative paths, making the folders that they need."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def image_folder(root: Path, counts: Mapping[str, int], *, first: int = 0) -> Path:
    """An ImageFolder with this many JPEGs a class; images are numbered from `first`."""
    names = [f"{name}/{name}_{i}.JPEG" for name, count in counts.items() for i in range(count)]
    return write_files(root, {name: image(first + i) for i, name in enumerate(names)})


def files_below(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by relative path."""
    found = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def pack_folder(source: Path, destination: Path, **options: int) -> PackedSplit:
    """Pack one split in this process; options are Packing's."""
    packing = Packing(**options)
    job = Job(listing=scan(source), store=LocalStore(destination), split="train", packing=packing)
    pack(job, workers=1)
    return PackedSplit.open(str(destination))


def run_shard(
    *arguments: str | Path, before: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run shard.py to its end, behind another command if one is given."""
    line = [*before, *SHARD_PY, *map(str, arguments)]
    return subprocess.run(
        line, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
