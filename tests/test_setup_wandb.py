"""setup_wandb.sh: what it would run, and what it runs on a stub Python."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "setup_wandb.sh"
KEY = "0123456789abcdef0123456789abcdef01234567"


class Machine:
    """A Python that only writes down what it was asked, with or without wandb."""

    def __init__(self, root: Path) -> None:
        self.python = root / "python"
        self.log = root / "log"
        self.status = {"import": 0, "login": 0}

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        self.python.write_text(
            f'#!/bin/sh\ncase "$*" in *import*) exit {self.status["import"]};; esac\n'
            f'echo "$*" >>{self.log}\n'
            f'case "$*" in *login*) exit {self.status["login"]};; esac\n'
        )
        self.python.chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=inherited | {"PYTHON": str(self.python)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def calls(self) -> list[str]:
        """What was run, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """With wandb installed."""
    return Machine(tmp_path)


def test_a_key_of_the_environment_is_stored_and_never_printed(machine: Machine) -> None:
    """It is on no command line, where other users would see it, and in no output."""
    done = machine.run(WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert machine.calls() == ["-m wandb login --verify"]
    assert KEY not in done.stdout + done.stderr
    assert "recipes/single_gpu_full.yaml" in done.stdout


def test_wandb_is_installed_where_it_is_missing(machine: Machine) -> None:
    """In the version that is tested with the rest."""
    machine.status["import"] = 1
    assert machine.run("--host", "https://w.example.com", WANDB_API_KEY=KEY).returncode == 0
    assert machine.calls() == [
        "-m pip install --quiet --constraint constraints.txt wandb",
        "-m wandb login --verify --host https://w.example.com",
    ]


def test_a_dry_run_prints_the_commands_and_runs_none(machine: Machine) -> None:
    """Without a terminal, a key and wandb."""
    machine.status["import"] = 1
    done = machine.run("--dry_run")
    assert done.returncode == 0
    assert "pip install --quiet --constraint constraints.txt wandb" in done.stdout
    assert "-m wandb login --relogin --verify" in done.stdout
    assert machine.calls() == []


def test_without_a_terminal_and_a_key_it_says_what_to_do(machine: Machine) -> None:
    """It does not wait for an answer that cannot come."""
    done = machine.run()
    assert done.returncode == 2
    assert "set WANDB_API_KEY" in done.stderr
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--hots"], "unknown argument --hots"), (["--host", "me"], "--host needs a URL")],
)
def test_wrong_use(machine: Machine, arguments: list[str], message: str) -> None:
    """Exit status 2, and what was wrong."""
    done = machine.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_key_that_does_not_work_is_a_failure(machine: Machine) -> None:
    """The status of wandb's own check is not lost."""
    machine.status["login"] = 1
    done = machine.run(WANDB_API_KEY=KEY)
    assert done.returncode == 1
    assert "wandb failed with status 1" in done.stderr
