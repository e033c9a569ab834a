"""The set-up: the C extension is built where it can be, and its lack stops nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.decode import decoder_name

ROOT = Path(__file__).parents[1]


def build(target: Path, **environment: str) -> tuple[list[str], str]:
    """Build the extension as an installation does; the files that come of it, and its errors."""
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(target / "lib"),
         "--build-temp", str(target / "temp")],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [path.name for path in (target / "lib").rglob("*.so")], run.stderr


@pytest.mark.skipif(
    decoder_name().startswith("pillow"), reason="it was not built here, so it cannot be"
)
def test_it_is_built_from_its_sources(tmp_path: Path) -> None:
    """With compiler and headers there is a module."""
    built, _ = build(tmp_path)
    assert [name.partition(".")[0] for name in built] == ["_jpeg"]


@pytest.mark.parametrize("lack", ["compiler", "headers"])
def test_an_installation_without_it_succeeds(tmp_path: Path, lack: str) -> None:
    """Without a compiler, or without libjpeg's headers, there is a warning and no module."""
    (tmp_path / "jpeglib.h").write_text("#error no such header\n")
    environment = {"CC": "/bin/false"} if lack == "compiler" else {"CFLAGS": f"-I{tmp_path}"}
    built, errors = build(tmp_path, **environment)
    assert built == []
    assert "_jpeg" in errors
