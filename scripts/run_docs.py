#!/usr/bin/env python3
"""Run the commands that the documents tell a newcomer to type, as they stand there.

Each ```bash block of README.md and docs/03_getting_started.md is run from top to bottom, in one
shell a document, in a copy of the checkout that holds its files, its .venv and what was compiled:
what a fresh clone is after `make setup`. The first command that fails, or takes too long, ends it.

What cannot run everywhere stands right below a line that tells the reader what is missing:

    *Needs ImageNet and 8 GPUs:*

Such a block is not run; that the programs and recipes it names exist is checked.
"""

import argparse
import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from sharding.console import positive
from sharding.errors import DataError, UsageError, reports_errors

EXAMPLES = """examples:
  python scripts/run_docs.py
  python scripts/run_docs.py --list
  python scripts/run_docs.py docs/03_getting_started.md --limit_s 120
"""
ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/03_getting_started.md")
_NEEDS = re.compile(r"\*Needs (.+):\*")
_OURS = re.compile(r"(?:(?:scripts|recipes|docs)/)?[\w-]+\.(?:py|sh|sbatch|yaml)")
_TYPED = re.compile(r"\s*(\$ )?(python3?|make|scripts/\S+\.sh|pip|source|srun|sbatch|docker) ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What is typed at one prompt."""

    document: str
    line: int
    """Where it begins, from 1."""
    text: str
    """Without the line breaks that a backslash hides."""
    needs: str | None = None
    """What it cannot run without; None: nothing but the checkout."""

    @property
    def place(self) -> str:
        """As compilers write it."""
        return f"{self.document}:{self.line}"


def commands(document: str, text: str) -> list[Command]:
    """PURE: the commands of a document's ```bash blocks.

    document: its name. text: Markdown. Raises DataError for a block without an end, and for a
    command in any other block, which nobody would run.
    """
    found: list[Command] = []
    fence, needs, begun = None, None, ""
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fence = line[3:].strip() or "text" if fence is None else None
            if fence is None:
                needs = None
        elif fence == "bash":
            first = first if begun else number
            begun += line.partition(" #")[0].strip() if not line.startswith("#") else ""
            if begun.endswith("\\"):
                begun = begun[:-1]
            elif begun:
                found.append(Command(document=document, line=first, text=begun, needs=needs))
                begun = ""
        elif _TYPED.match(line) and (fence is not None or line.startswith("    ")):
            raise DataError(f"{document}:{number}: a command outside of a ```bash block: {line}")
        elif line.strip():
            match = _NEEDS.fullmatch(line.strip())
            needs = match[1] if match else None
    if fence is not None:
        raise DataError(f"{document}: the last block has no end")
    return found


def missing(command: Command, root: Path) -> list[str]:
    """Our programs and recipes that a command names and the checkout does not have."""
    words = [word for word in shlex.split(command.text) if _OURS.fullmatch(word)]
    return [word for word in words if not (root / word).exists()]


class Shell:
    """A bash that takes one command after the other, as an interactive one would."""

    def __init__(self, folder: Path) -> None:
        """folder: where it begins."""
        self._status, status = os.pipe()
        self._process = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=_environment(),
            stdin=subprocess.PIPE,
            pass_fds=[status],
            start_new_session=True,
            text=True,
        )
        os.close(status)
        self._number = status

    def run(self, text: str, limit_s: float) -> int:
        """Exit status of one command, which gets no input.

        Raises TimeoutError when it takes longer than limit_s seconds, EOFError where it ends the
        shell.
        """
        assert self._process.stdin is not None
        number = self._number
        line = f"eval {shlex.quote(text)} </dev/null {number}>&-; echo $? >&{number}\n"
        self._process.stdin.write(line)
        self._process.stdin.flush()
        if not select.select([self._status], [], [], limit_s)[0]:
            raise TimeoutError
        answer = os.read(self._status, 16)
        if not answer:
            raise EOFError
        return int(answer)

    def close(self) -> None:
        """End the shell and all that still runs in its process group: asked first, then killed."""
        os.close(self._status)
        assert self._process.stdin is not None
        self._process.stdin.close()  # an idle shell ends by that
        for number, patience_s in ((signal.SIGINT, 10.0), (signal.SIGKILL, None)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)


def run_document(listed: list[Command], folder: Path, limit_s: float) -> Iterator[Command]:
    """Run the commands of one document that need nothing; yields each when it has succeeded.

    Raises ChildProcessError with place and text of the first one that fails.
    """
    shell = Shell(folder)
    try:
        for command in listed:
            if command.needs is not None:
                continue
            print(f"\n{command.place} $ {command.text}", flush=True)
            try:
                status = shell.run(command.text, limit_s)
            except TimeoutError:
                status, reason = 1, f"took longer than {limit_s:g} s"
            except EOFError:
                status, reason = 1, "ended the shell"
            else:
                reason = f"exit status {status}"
            if status:
                raise ChildProcessError(f"{command.place}: {reason}: {command.text}")
            yield command
    finally:
        shell.close()


def copy_checkout(root: Path, target: Path) -> None:
    """A fresh clone after `make setup`: what git does not ignore, .venv, and what was compiled."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = [name for name in listing.split("\0") if name and (root / name).is_file()]
    compiled = [str(path.relative_to(root)) for path in root.glob("loaders/*.so")]
    for name in names + compiled:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)  # with its times, which make compares
    (target / ".venv").symlink_to((root / ".venv").resolve())


def check_setup(copy: Path) -> None:
    """Raises UsageError unless .venv is up to date: else make would install the copy into it."""
    done = subprocess.run(["make", "-q", ".venv/ready"], cwd=copy, env=_environment(), check=False)
    if done.returncode:
        raise UsageError(".venv is older than what it is made of; run `make setup` first")


def _environment() -> dict[str, str]:
    """That of a terminal: without what `make` hands to its children."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", nargs="*", default=DOCUMENTS, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="show the commands, run none")
    parser.add_argument(
        "--limit_s", type=positive, default=600, metavar="S", help="of one command (default 600)"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="FOLDER", help="the checkout (default: this)"
    )
    return parser.parse_args(arguments)


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the documents; exit status 1 where a command fails, 3 where a document is wrong."""
    options = _options(arguments)
    listed = {name: commands(name, (options.root / name).read_text()) for name in options.documents}
    for name, document in listed.items():
        for command in document:
            if lacks := missing(command, options.root):
                raise DataError(f"{command.place}: there is no {', '.join(lacks)}: {command.text}")
            if options.list:
                print(f"{command.place}: {command.needs or 'run'}: {command.text}")
        if all(command.needs is not None for command in document):
            raise DataError(f"{name} holds no command that could be run")
    if options.list:
        return 0
    began = time.monotonic()
    done = 0
    with tempfile.TemporaryDirectory(prefix="run_docs-") as folder:
        for name, document in listed.items():
            target = Path(folder) / Path(name).stem
            copy_checkout(options.root, target)
            check_setup(target)
            done += sum(1 for _ in run_document(document, target, options.limit_s))
    print(f"\nrun_docs: {done} commands in {time.monotonic() - began:.0f} s, all well")
    needs = Counter(c.needs for document in listed.values() for c in document if c.needs)
    for what, number in needs.items():
        print(f"run_docs: not run: {number}, which need {what}")
    return 0


if __name__ == "__main__":
    # An exception, as Ctrl-C is: what runs is ended, and the copy removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
