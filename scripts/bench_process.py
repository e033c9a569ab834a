"""The processes that contenders of a benchmark run in, each in its own interpreter of .bench/."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900
_LAST_WORDS_S = 10.0


class MissingError(Exception):
    """Raised when a contender cannot take part; says why."""


def command(module: str, venv: str, *arguments: str, required: bool = False) -> list[str]:
    """Run a file of scripts/ in an interpreter of .bench/, or in this one where that is not there.

    Raises MissingError if it is required.
    """
    python = ROOT / ".bench" / venv / "bin" / "python"
    if not venv or not python.exists():
        if venv and required:
            raise MissingError(f"scripts/bench_setup.sh {venv} installs it")
        python = Path(sys.executable)
    return [str(python), "-m", f"scripts.{module}", *arguments]


def environment() -> dict[str, str]:
    """One thread each where libraries would take all cores; our modules can be imported."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_to_end(line: Sequence[str], *, folder: Path, log: Path) -> None:
    """Run a command in a folder. Raises MissingError with the last line that it said."""
    with log.open("w") as output:
        status = subprocess.run(
            line,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(),
            cwd=folder,
            check=False,
        ).returncode
    if status:
        raise MissingError(last_line(log))


class Runner:
    """A process that answers each line with one of JSON; it and all it started end with close()."""

    def __init__(
        self, line: Sequence[str], *, folder: Path, log: Path, environ: Mapping[str, str]
    ) -> None:
        """Start it, and wait for its first answer. Raises MissingError if it does not come."""
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environ,
                cwd=folder,
                start_new_session=True,
            )
        self.facts = self._answer()

    def ask(self, *words: object) -> dict[str, Any]:
        """What it answers. Raises MissingError if it ends, or takes too long."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: that no answer comes tells why
            print(*words, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process and all that it started."""
        self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a line that it never read
                pipe.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self._kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_WORDS_S)  # it may have to say why
            self.close()
            raise MissingError(last_line(self._log))
        answer: dict[str, Any] = json.loads(line)
        return answer


def last_line(log: Path) -> str:
    """What an error in a child's log comes down to."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it ended without a word"
