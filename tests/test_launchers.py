"""launch_single.sh and launch_multi.sh: what they would run, what arrives, and how they end.

Two stubs stand in for what is not tried here. ssh runs its command on this machine, through a shell
as sshd would. Python, in all but the last test, is a script: it answers launch_plan.py's question,
and plays torchrun.
"""

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from model.preemption import EXIT_PREEMPTED, MARKER
from scripts import launch_plan
from tests.ports import free_port
from tests.runs import lines

SCRIPTS = Path(__file__).parents[1] / "scripts"
SINGLE, MULTI = SCRIPTS / "launch_single.sh", SCRIPTS / "launch_multi.sh"
ODD = 'name=it\'s "$(touch made)" * ü;'

SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
host=$1; shift
[ "$host" != unreachable ] || { echo "ssh: connect to host $host: No route to host" >&2; exit 255; }
# A process of sshd ignores no signals, whatever its client does.
exec env --default-signal /bin/sh -c "$*"
"""
PYTHON = f"""#!/bin/bash
case $1 in */launch_plan.py) echo 1; echo "$RUN"; exit 0;; esac
exec {shlex.quote(sys.executable)} - "$@" <<'PY'
import json, os, sys
with open(os.environ["RUN"] + "/argv.jsonl", "a") as stream:
    facts = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "extra": os.environ.get("EXTRA")}}
    stream.write(json.dumps(facts) + "\\n")
os.execv("/bin/bash", ["bash", "-c", os.environ["AGENT"], *sys.argv])
PY
"""
# A training process that saves when it is asked, as a child of a torchrun that ends with 1.
SAVES = """
LOCAL_RANK=0 bash -c 'trap "echo step 7 >\\"$RUN/PREEMPTED\\"; exit 75" USR1
  echo ready >"$RUN/fifo"; for _ in {1..1200}; do sleep 0.05; done' || exit 1
"""


class Machine:
    """A folder with stubs that come first on PATH, a run's folder and an environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_folder = root / "run it's"
        self.run_folder.mkdir()
        (root / "bin").mkdir()
        for name, text in (("ssh", SSH), ("stub", PYTHON)):
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        os.mkfifo(self.run_folder / "fifo")
        self.environment = os.environ | {
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(root / "bin" / "stub"),
            "RUN": str(self.run_folder),
            "AGENT": "exit 0",
            "TMPDIR": str(root),
        }

    def hosts(self, *names: str) -> str:
        path = self.root / "hosts.txt"
        path.write_text("# machines\n" + "".join(f"{name}\n" for name in names))
        return f"--hosts={path}"

    @contextmanager
    def start(
        self, script: Path, *arguments: str, **environment: str
    ) -> Iterator["subprocess.Popen[str]"]:
        with subprocess.Popen(
            [script, *arguments],
            env=self.environment | environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, script: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        with self.start(script, *arguments, **environment) as process:
            out, errors = process.communicate(timeout=250)
            return process.returncode, out, errors

    def ready(self, count: int = 1) -> None:
        """Wait until so many training processes were started and know the signal."""
        while count > 0:
            count -= (self.run_folder / "fifo").read_text().count("ready")

    def started(self) -> list[dict[str, str]]:
        """What each torchrun was given."""
        text = (self.run_folder / "argv.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine whose folders have spaces and quotes in their names."""
    root = tmp_path / "my project's"
    root.mkdir()
    return Machine(root)


def recipe(tmp_path: Path, text: str = "trainer: {accelerator: cpu, devices: 3}") -> str:
    """A recipe's path."""
    path = tmp_path / "r.yaml"
    path.write_text(text + "\nname: mine\n")
    return f"--config={path}"


@pytest.mark.parametrize(
    ("text", "arguments", "gpus", "expected"),
    [
        ("trainer: {accelerator: cpu, devices: 3}", (), 8, "3\nruns/mine\n"),
        ("trainer: {devices: 3}", (), 8, "8\nruns/mine\n"),
        ("trainer: {devices: 3}", ("--devices", "2", "--run", "a b"), 8, "2\na b\n"),
        ("trainer: {devices: 3}", ("trainer.devices=4", "name=x"), 0, "4\nruns/x\n"),
        # 1,024 cannot be made by 3 processes, which is what the recipe says, but by 8.
        ("trainer: {devices: 3, batch_size: 64, global_batch_size: 1024}", (), 8, "8\nruns/mine\n"),
    ],
    ids=str,
)
def test_the_plan_counts_processes_and_finds_the_runs_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    arguments: tuple[str, ...],
    gpus: int,
    expected: str,
) -> None:
    """What the user named, else one a GPU, and the recipe's own number on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launch_plan.main([recipe(tmp_path, text), *arguments]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trainer.accelerator=auto",), "there is no GPU here; say how many processes"),
        (("--nodes", "2", "trainer.nodes=4"), "trainer.nodes=4, but 2 machines are started"),
        (("trainer.epoch=1",), "unknown key trainer.epoch"),
        (("--run", "a\nb"), "has a line break"),
    ],
)
def test_wrong_use_is_found_before_anything_is_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    """One line and status 2."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch_plan.main([recipe(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_prints_the_command_and_runs_nothing(machine: Machine) -> None:
    """Words with quotes and blanks stand as one would type them."""
    status, out, errors = machine.run(SINGLE, "--config", "r.yaml", "--dry_run", ODD)
    assert (status, errors) == (0, "")
    _, *words = shlex.split(out)
    assert words == [
        "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "1", "--standalone",
        "--", str(SCRIPTS.parent / "train.py"), "--config", "r.yaml", ODD,
        "--nodes", "1", "--devices", "1", "--run", str(machine.run_folder),
    ]  # fmt: skip
    assert not (machine.run_folder / "argv.jsonl").exists()


def test_a_dry_run_of_several_machines_prints_each_command(machine: Machine) -> None:
    """The ssh line, which a shell can run, and below it what is started there."""
    line = ("--config", "r.yaml", ODD, "--dry_run", "--port", "4000", "--env=NCCL_DEBUG=INFO WARN")
    status, out, errors = machine.run(MULTI, machine.hosts("me@one", "two  # slow"), *line)
    assert (status, errors) == (0, "")
    first, there, second, _ = out.splitlines()
    assert "--node_rank 0 --master_addr one --master_port 4000" in there
    for rank, (text, host) in enumerate(((first, "me@one"), (second, "two"))):
        *ssh, name, remote = shlex.split(text)
        assert (ssh[0], name) == ("ssh", host)
        assert shlex.split(remote) == [
            "cd", str(machine.root), "&&", "exec", "env", "NCCL_DEBUG=INFO WARN",
            f"PYTHON={machine.environment['PYTHON']}", str(SINGLE), "--nodes", "2",
            "--node_rank", str(rank), "--rendezvous", "one:4000", "--planned", "1",
            str(machine.run_folder), "--stop_at_eof", "--config", "r.yaml", ODD,
        ]  # fmt: skip
    assert not (machine.run_folder / "argv.jsonl").exists()


def test_every_word_arrives_as_it_was_typed(machine: Machine) -> None:
    """Through ssh and the other machine's shell, in the same folder, with what --env set."""
    line = ("--config", "r.yaml", ODD, "--env", f"EXTRA={ODD}")
    status, _, errors = machine.run(MULTI, machine.hosts("one", "two"), *line)
    assert status == 0, errors
    started = machine.started()
    assert sorted(facts["argv"][facts["argv"].index("--node_rank") + 1] for facts in started) == [
        "0",
        "1",
    ]
    for facts in started:
        assert ODD in facts["argv"]
        assert (facts["cwd"], facts["extra"]) == (str(machine.root), ODD)
    assert not (machine.root / "made").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("one", "-oProxyCommand=sh"), "line 3: -oProxyCommand=sh is no machine"),
        (("one;reboot",), "line 2: 'one;reboot' is no machine"),
        (("$(reboot)",), "line 2: '$(reboot)' is no machine"),
        (("one slots=8",), "line 2: 'one slots=8' is no machine"),
        (("one", "one"), "line 3: one stands there twice"),
        ((), "names no machine"),
    ],
    ids=str,
)
def test_what_is_no_machine_is_refused(
    machine: Machine, names: tuple[str, ...], message: str
) -> None:
    """The line is named; an option of ssh or a shell's text never reaches either."""
    status, _, errors = machine.run(MULTI, machine.hosts(*names), "--config", "r.yaml")
    assert status == 2
    assert message in errors


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (SINGLE, (), "what shall be trained?"),
        (SINGLE, ("--config", "r", "--nodes", "2"), "need --rendezvous HOST:PORT"),
        (SINGLE, ("--config", "r", "--nodes=2", "--node_rank=2"), "must be in 0..1, got 2"),
        (MULTI, ("--config", "r"), "Give a hosts file"),
        (MULTI, ("--hosts", "nowhere", "--config", "r"), "there is no hosts file nowhere"),
        (MULTI, ("--hosts", "/dev/null", "--nodes", "2"), "the machines are those of the hosts"),
        (MULTI, ("--hosts", "/dev/null", "--config", "r", "--port=70000"), "must be in 1..65535"),
    ],
    ids=str,
)
def test_each_mistake_is_one_line(
    machine: Machine, script: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Status 2, and what to do."""
    status, _, errors = machine.run(script, *arguments)
    assert status == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_preempted_is_75_and_a_marker_of_before_does_not_count(machine: Machine) -> None:
    """Torchrun's 1 becomes 75 where this run left the marker, and only there."""
    line = (SINGLE, "--config", "r.yaml")
    marked = 'echo step 7 >"$RUN/PREEMPTED"; exit 1'
    status, _, errors = machine.run(*line, AGENT=marked)
    assert status == EXIT_PREEMPTED
    assert "preempted (step 7); the same command with --resume auto goes on" in errors
    assert machine.run(*line, AGENT="exit 1")[0] == 1
    assert not (machine.run_folder / MARKER).exists()


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_training_processes(machine: Machine, name: signal.Signals) -> None:
    """They, not torchrun, are told, save, and the launcher ends with 75."""
    with machine.start(SINGLE, "--config", "r.yaml", AGENT=SAVES) as process:
        machine.ready()
        process.send_signal(name)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_PREEMPTED, errors
    assert "preempted (step 7)" in errors


def test_processes_that_do_not_end_are_killed(machine: Machine) -> None:
    """After LAUNCH_STOP_SECONDS nobody is left; nothing was saved, which is said; 75."""
    deaf = """
      LOCAL_RANK=0 bash -c 'trap "" USR1 TERM; echo $$ >"$RUN/pid"; echo ready >"$RUN/fifo"
        for _ in {1..1200}; do sleep 0.05; done'
    """
    stop = {"LAUNCH_STOP_SECONDS": "1"}
    with machine.start(SINGLE, "--config", "r.yaml", AGENT=deaf, **stop) as process:
        machine.ready()
        watched = os.pidfd_open(int((machine.run_folder / "pid").read_text()))
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_PREEMPTED
    assert "have not ended; killing them" in errors
    assert "stopped by SIGTERM and not saved" in errors
    assert select.select([watched], [], [], 10)[0], "it outlived its launcher"
    os.close(watched)


def test_one_machine_that_fails_ends_all(machine: Machine) -> None:
    """The others are asked to end; the status is the failed one's, and its name is said."""
    agent = """
      case "$*" in *"--node_rank 1 "*) read -r _ <"$RUN/fifo"; echo out of luck >&2; exit 1;; esac
      LOCAL_RANK=0 bash -c 'trap "exit 1" USR1
        echo ready >"$RUN/fifo"; for _ in {1..1200}; do sleep 0.05; done'
    """
    status, _, errors = machine.run(
        MULTI, machine.hosts("one", "two"), "--config", "r.yaml", AGENT=agent
    )
    assert status == 1
    assert "two: out of luck" in errors
    assert "launch_multi: two failed with status 1" in errors
    assert "one: launch_single: EOF: the training processes save and end" in errors


def test_a_machine_that_is_not_there_is_named(machine: Machine) -> None:
    """The rest is ended; ssh's status is the launcher's."""
    status, _, errors = machine.run(
        MULTI, machine.hosts("one", "unreachable"), "--config", "r.yaml", AGENT=SAVES
    )
    assert status in {255, EXIT_PREEMPTED}  # 75: the others had time to save
    assert "unreachable could not be reached" in errors


def test_a_signal_to_the_launcher_saves_on_all_machines(machine: Machine) -> None:
    """All are asked, and 75 comes back."""
    hosts = machine.hosts("one", "two")
    with machine.start(MULTI, hosts, "--config", "r.yaml", AGENT=SAVES) as process:
        machine.ready(2)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_PREEMPTED, errors
    assert "launch_multi: preempted" in errors


def test_machines_do_not_outlive_a_launcher_that_is_killed(machine: Machine) -> None:
    """Its pipe closes, which asks them to save and end."""
    agent = SAVES.replace("echo ready", 'echo $$ >>"$RUN/pids"; echo ready')
    hosts = machine.hosts("one", "two")
    with machine.start(MULTI, hosts, "--config", "r.yaml", AGENT=agent) as process:
        machine.ready(2)
        pids = (machine.run_folder / "pids").read_text().split()
        watched = [os.pidfd_open(int(pid)) for pid in pids]
        process.kill()
        for descriptor in watched:
            assert select.select([descriptor], [], [], 30)[0], "a training process lives on"
            os.close(descriptor)
    assert len(pids) == 2
    assert (machine.run_folder / MARKER).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_train_are_preempted_and_go_on(
    machine: Machine, small_recipe: Path, tmp_path: Path
) -> None:
    """With torchrun and training as they are: 75 after a signal, then the rest, each step once."""
    machine.environment["PYTHON"] = sys.executable
    run = tmp_path / "run"
    hosts = machine.hosts("localhost", "127.0.0.1")
    line = [hosts, "--config", str(small_recipe), "--batch_size", "4", "--run", str(run)]
    line += ["schedule.name=step", "--resume", "auto"]
    with machine.start(MULTI, *line, f"--port={free_port()}", "--epochs", "40") as process:
        while lines(run) < 4:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == EXIT_PREEMPTED, errors
    step = int((run / MARKER).read_text().split()[1])
    epochs = step // 6 + 2
    more = (f"--port={free_port()}", "--epochs", str(epochs))
    status, out, errors = machine.run(MULTI, *line, *more)
    assert status == 0, errors
    assert "resuming from" in out
    for rank in range(2):
        text = (run / f"samples-rank{rank}.jsonl").read_text()
        steps = [json.loads(each)["step"] for each in text.splitlines()]
        assert steps == list(range(epochs * 6))
