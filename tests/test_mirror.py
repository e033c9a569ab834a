"""model/mirror.py: a thread publishes, the newest wins, failures are told, the end waits."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch

from model.checkpoint import LAST, AtomicCheckpointIO
from model.mirror import FAILED_S, HURRY_S, Mirror, Publishing
from model.newest import newest_whole
from model.preemption import EXIT_PREEMPTED, MARKER, PreemptedError
from model.published import Published
from sharding.s3 import S3Store
from sharding.store import LocalStore, atomic_file
from tests.fault_proxy import BUCKET, Fault, FaultProxy, s3_endpoint
from tests.s3_stores import POLICY

WAIT_S = 30


class Gated(LocalStore):
    """A store that holds its writer until it may go on, and refuses when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open_gate = threading.Event()
        self.reached = threading.Semaphore(0)
        self.refuses = False
        self.written: list[str] = []

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        if name.endswith(".ckpt"):
            self.reached.release()
            assert self.open_gate.wait(WAIT_S)
            if self.refuses:
                raise PermissionError(f"cannot write {name}: 403")
        with super().create(name) as stream:
            yield stream
        if name.endswith(".ckpt"):
            self.written.append(name)


class Rig:
    """A mirror, what it warned of, and checkpoints that are saved through it."""

    def __init__(self, store: Any, folder: Path) -> None:
        self.store = store
        self.told: list[str] = []
        self.folder = folder
        self.mirror = Mirror(Published(store), warn=self.told.append)
        self.files = AtomicCheckpointIO(atomic_file, self.mirror)

    def save(self, step: int, name: str = LAST) -> None:
        self.files.save_checkpoint(
            {"global_step": step, "x": torch.arange(50) + step}, self.folder / name
        )

    def steps(self, folder: Path) -> dict[str, int]:
        """What is in a store's folder; all of it whole."""
        assert newest_whole(folder).broken == []
        return {
            path.name: torch.load(path, weights_only=True)["global_step"]
            for path in folder.glob("*.ckpt")
        }


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """Over a gated store."""
    return Rig(Gated(tmp_path / "store"), tmp_path / "run")


def test_saving_does_not_wait_and_the_newest_wins(rig: Rig) -> None:
    """While the first one is on its way only the last of the others waits."""
    for step in (1, 2, 3, 4):
        rig.save(step)  # the gate is shut: none of these waits for it
        if step == 1:
            assert rig.store.reached.acquire(timeout=WAIT_S)
    rig.store.open_gate.set()
    rig.files.teardown()
    assert rig.steps(rig.store.root) == {LAST: 4, "last.previous.ckpt": 1}
    assert rig.store.written == [LAST, LAST]
    assert rig.told == []


def test_the_last_comes_before_the_best_and_removals_count(rig: Rig) -> None:
    """What a run goes on from first; a best one that was beaten meanwhile is not sent at all."""
    rig.save(1)
    assert rig.store.reached.acquire(timeout=WAIT_S)
    for name in ("a.ckpt", "b.ckpt"):
        rig.save(2, name)
    rig.files.remove_checkpoint(rig.folder / "a.ckpt")
    rig.save(3)
    rig.store.open_gate.set()
    rig.mirror.close()
    assert rig.store.written == [LAST, LAST, "b.ckpt"]
    assert set(rig.steps(rig.store.root)) == {LAST, "last.previous.ckpt", "b.ckpt"}


def test_a_file_that_is_replaced_on_its_way_is_sent_as_it_was(rig: Rig) -> None:
    """The bytes of one save, not of two."""
    rig.save(1)
    assert rig.store.reached.acquire(timeout=WAIT_S)
    rig.save(2)
    rig.save(3)
    (rig.folder / LAST).unlink()
    rig.store.open_gate.set()
    rig.mirror.close()
    assert rig.steps(rig.store.root) == {LAST: 3, "last.previous.ckpt": 1}
    assert rig.told == []


def test_failures_are_counted_told_and_tried_again(rig: Rig) -> None:
    """With each checkpoint one warning, with the step that is there; the end tries once more."""
    rig.store.open_gate.set()
    rig.save(1)
    wait_for(lambda: rig.store.written == [LAST])
    rig.store.refuses = True
    for step in (2, 3):
        rig.save(step)
        wait_for(lambda step=step: len(rig.told) == step - 1)
    rig.save(3, "best.ckpt")
    wait_for(lambda: len(rig.told) >= 4)  # the last one again, and the best one
    for number, line in enumerate(rig.told, 1):
        assert f"(failure {number} in a row, last.ckpt there is of step 1): cannot write" in line
    assert rig.told[1].startswith(f"cannot publish last.ckpt of step 3 in {rig.store.url}")
    rig.store.refuses = False
    rig.mirror.close()
    assert len(rig.told) == 4
    assert rig.steps(rig.store.root) == {LAST: 3, "last.previous.ckpt": 1, "best.ckpt": 3}


def test_what_is_not_there_at_the_end_is_said(rig: Rig) -> None:
    """Refused to the last, or not done in the time: never as if it were there."""
    rig.store.refuses = True
    rig.store.open_gate.set()
    rig.save(1)
    rig.mirror.close()
    assert rig.told[-1].startswith(f"not in {rig.store.url} at the end: last.ckpt of step 1")
    assert "this process has not published last.ckpt yet" in rig.told[-1]
    slow = Rig(Gated(rig.folder / "slow"), rig.folder)
    slow.save(5)
    assert slow.store.reached.acquire(timeout=WAIT_S)
    slow.save(6)
    slow.mirror.close(0.0)
    assert "last.ckpt of step 6, last.ckpt of step 5" in slow.told[-1]
    slow.mirror.close()  # again: it was said
    assert len(slow.told) == 1
    slow.store.open_gate.set()
    wait_for(
        lambda: not any(thread.name == "checkpoint mirror" for thread in threading.enumerate())
    )
    assert slow.store.written == [LAST]


def test_no_file_stays_open(rig: Rig) -> None:
    """Neither of what was published, nor of what was replaced while it waited."""
    before = len(os.listdir("/proc/self/fd"))
    for step in (1, 2, 3):
        rig.save(step)
    rig.files.remove_checkpoint(rig.folder / LAST)
    rig.store.open_gate.set()
    rig.mirror.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_open_files_do_not_stop_a_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot even be opened is a warning."""

    def crowded(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", crowded)
        rig.mirror.publish(rig.folder / LAST, SimpleNamespace())  # type: ignore[arg-type]
    assert "Too many open files" in rig.told[0]


def test_an_outage_of_s3(tmp_path: Path) -> None:
    """Refused, cut off, and back: the service holds the newest, and nothing half-written."""
    with FaultProxy(s3_endpoint(), method="PUT") as proxy:
        store = S3Store(f"s3://{BUCKET}/{tmp_path.name}", endpoint=proxy.url, policy=POLICY)
        rig = Rig(store, tmp_path / "run")
        proxy.plan([Fault(kind="status", status=403, code="AccessDenied")])
        rig.save(1)
        wait_for(lambda: len(rig.told) == 1)
        proxy.plan([Fault(kind="reset", at=-1), Fault(kind="status"), Fault(kind="close", at=-1)])
        rig.save(2)
        rig.save(3)
        rig.mirror.close()
    assert len(rig.told) == 1
    copied = tmp_path / "copied"
    copied.mkdir()
    direct = S3Store(store.url, endpoint=s3_endpoint())
    for name in direct.sizes():
        (copied / name).write_bytes(direct.read(name))
    assert rig.steps(copied)[LAST] == 3


@pytest.mark.parametrize("preempted", [True, False])
def test_an_early_end_hurries_and_a_preempted_one_waits_for_all(preempted: bool) -> None:
    """After a preemption no rank ends before the one that publishes; after an error each does."""
    events: list[object] = []
    mirror = SimpleNamespace(close=events.append)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(barrier=events.append))
    error = PreemptedError(3, saved=True) if preempted else ValueError("lost")
    Publishing(mirror).on_exception(trainer, None, error)  # type: ignore[arg-type]
    assert events == ([HURRY_S, "published"] if preempted else [FAILED_S])
    Publishing(None).on_exception(trainer, None, error)  # type: ignore[arg-type]
    assert len(events) == (3 if preempted else 1)


def test_a_preempted_run_is_on_s3_before_it_ends(small_recipe: Path, tmp_path: Path) -> None:
    """The checkpoint of the last step, of two ranks, where another machine finds it."""
    s3_endpoint()
    run, url = tmp_path / "run", f"s3://{BUCKET}/{tmp_path.name}"
    fault = {"rank": 1, "place": "train", "step": 2, "do": "SIGTERM"}
    done = subprocess.run(
        [
            sys.executable, Path(__file__).with_name("faulty.py"), "--config", small_recipe,
            "--run", run, "--devices=2", "--batch_size=4", f"--checkpoint_url={url}",
        ],
        env=os.environ | {"FAULTS": json.dumps([fault]), "AWS_ENDPOINT_URL": s3_endpoint()},
        stderr=subprocess.PIPE,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "publish" not in done.stderr
    place = Published(S3Store(url, endpoint=s3_endpoint()))
    saved = (run / MARKER).read_text()
    assert f"step {place.fetch(LAST, tmp_path / 'fetched', atomic_file).step}\n" == saved


def wait_for(condition: Any) -> None:
    """Until another thread made it true."""
    done = threading.Event()
    for _ in range(WAIT_S * 100):
        if condition():
            return
        done.wait(0.01)
    raise TimeoutError
