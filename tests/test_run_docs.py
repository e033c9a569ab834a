"""The documents: their commands are found and run as typed, and what they point to is there."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.run_docs import DOCUMENTS, commands, main, missing
from sharding.errors import DataError

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PACKAGES = ("sharding", "loaders", "model", "recipes")
PROGRAMS = sorted(
    path for path in ROOT.glob("scripts/*.py") if "ArgumentParser" in path.read_text()
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a .venv that is up to date, and an ignored file."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "Makefile").write_text(".venv/ready:\n\ttouch $@\n")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/ready").touch()
    (tmp_path / ".gitignore").write_text("/data/\n/.venv\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own").write_text("not to be touched")
    return tmp_path


def run(checkout: Path, text: str, *options: str) -> int:
    """Run a document that holds this text."""
    (checkout / "a.md").write_text(text)
    return main(["a.md", "--root", str(checkout), *options])


def block(*lines: str) -> str:
    """A block of commands."""
    return "\n".join(["```bash", *lines, "```", ""])


def test_a_command_is_a_line_with_its_continuations() -> None:
    """Comments and empty lines are none; the line is that of the beginning."""
    text = "# Title\n\n" + block("# why", "", "make demo    # two minutes", "a \\", "    b=c", "d")
    found = [(command.line, command.text, command.needs) for command in commands("a.md", text)]
    assert found == [(6, "make demo", None), (7, "a b=c", None), (9, "d", None)]


def test_what_a_block_needs_stands_right_above_it() -> None:
    """It holds for one block, and only where nothing stands between."""
    needs = "*Needs 8 GPUs:*\n\n"
    text = needs + block("a") + block("b") + needs + "But first:\n\n" + block("c") + needs
    assert [command.needs for command in commands("a.md", text)] == ["8 GPUs", None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nmake\n", "a.md: the last block has no end"),
        ("Type:\n\n    python train.py --config x\n", "a.md:3: a command outside of a ```bash"),
        ("```text\n$ make demo\n```\n", "a.md:2: a command outside of a ```bash"),
    ],
)
def test_a_command_that_nobody_would_run_is_an_error(text: str, message: str) -> None:
    """Commands stand in blocks that say so."""
    with pytest.raises(DataError, match=message):
        commands("a.md", text)


def test_commands_share_a_shell_in_a_copy_of_the_checkout(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Folder and variables stay; ignored files are not there, and nothing is written back."""
    text = block(
        "test ! -e data && test -e .venv/ready && pwd", "mkdir data && touch data/new",
        "name=value && cd data", 'test -e new && test "$name" = value', "! read -r line",
    ) + "*Needs a cluster:*\n\n" + block("false")  # fmt: skip
    assert run(checkout, text) == 0
    output = capfd.readouterr().out
    assert "5 commands in" in output
    assert "not run: 1, which need a cluster" in output
    assert str(checkout) not in output  # pwd
    assert [path.name for path in (checkout / "data").iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("false", "a.md:3: exit status 1: false"),
        ("no-such-program", "a.md:3: exit status 127: no-such-program"),
        ("exit 0", "a.md:3: ended the shell: exit 0"),
        ("sleep 60", "a.md:3: took longer than 1 s: sleep 60"),
        ("if true", "a.md:3: exit status .: if true"),
    ],
)
def test_the_first_command_that_fails_is_named(
    checkout: Path, capfd: pytest.CaptureFixture[str], bad: str, message: str
) -> None:
    """With its line; those behind it are not run."""
    assert run(checkout, block("true", bad, "echo behind"), "--limit_s", "1") == 1
    output, error = capfd.readouterr()
    assert re.search(message, error)
    assert "\nbehind" not in output


def test_nothing_outlives_it(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Told to end, it ends what it runs, and removes the copy."""
    told = tmp_path_factory.mktemp("told") / "told"
    os.mkfifo(told)
    (checkout / "a.md").write_text(block(f"sleep 60 & echo $! $PWD >{told}; wait"))
    program = [sys.executable, str(ROOT / "scripts/run_docs.py"), "a.md", "--root", str(checkout)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL) as process:
        pid, copy = told.read_text().split()
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not Path(copy).exists()
    status = Path("/proc", pid, "stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("no command\n", 3, "a.md holds no command that could be run"),
        ("*Needs a GPU:*\n" + block("true"), 3, "a.md holds no command that could be run"),
        (block("true", "python gone.py"), 3, "a.md:3: there is no gone.py"),
        ("*Needs a GPU:*\n" + block("x --c recipes/no.yaml"), 3, "there is no recipes/no.yaml"),
    ],
)
def test_a_document_that_would_not_be_tried_is_an_error(
    checkout: Path, capfd: pytest.CaptureFixture[str], text: str, status: int, message: str
) -> None:
    """Nothing to run, or a program that is not there, in blocks that are not run, too."""
    assert run(checkout, text) == status
    assert message in capfd.readouterr().err


def test_an_old_set_up_is_refused(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Make would install the copy into the .venv that it shares with the checkout."""
    (checkout / ".venv/ready").unlink()
    assert run(checkout, block("touch ../ran")) == 2
    assert "run `make setup` first" in capfd.readouterr().err


@pytest.mark.parametrize("document", DOCUMENTS)
def test_our_documents_can_be_run(document: str) -> None:
    """They hold commands of both kinds, and name only programs and recipes that there are."""
    found = commands(document, (ROOT / document).read_text())
    assert any(command.needs is None for command in found)
    assert [name for command in found for name in missing(command, ROOT)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files that the documents point to, relative to themselves or named from the root."""
    text = page.read_text()
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [name for name in linked if not (page.parent / name).exists()] == []
    named = re.findall(r"\b((?:docs|scripts|recipes|tests)/[\w-]+\.(?:md|py|sh|yaml|sbatch))", text)
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_every_module_stands_in_the_readme() -> None:
    """The table of the folders is up to date, in both directions."""
    table = (ROOT / "README.md").read_text().partition("## The folders")[2].partition("\n## ")[0]
    named = sorted(re.findall(r"\w+\.py\b", table))
    there = [p.name for f in PACKAGES for p in ROOT.glob(f"{f}/*.py") if p.name != "__init__.py"]
    assert named == sorted([*there, "shard.py", "train.py", "eval.py", "shard.py"])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_program_shows_how_it_is_typed(program: Path) -> None:
    """In its docstring or its examples, both of which --help prints."""
    typed = rf"^ +python (scripts/|-m scripts\.){program.stem}"
    assert re.search(typed, program.read_text(), re.MULTILINE)
