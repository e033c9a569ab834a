"""recipes/start.py: which checkpoint a run starts from, of its folder and of a second place."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from model.checkpoint import LAST, PREVIOUS, AtomicCheckpointIO
from model.hashes import read_hashes
from recipes.start import (
    ANEW,
    FETCHED,
    INHERITED,
    Start,
    forget,
    held,
    local_checkpoint,
    open_published,
    placeholder,
    start_of,
)
from sharding.errors import DataError, UsageError
from sharding.store import atomic_file

FILES = AtomicCheckpointIO(atomic_file)


class Place:
    """A run's folder, a second place, and how it is asked."""

    def __init__(self, root: Path) -> None:
        self.run = root / "run"
        self.url = f"file://{root / 'elsewhere'}"
        self.elsewhere = root / "elsewhere"
        self.told: list[str] = []
        self.environ: dict[str, str] = {}

    def save(self, step: int, name: str = LAST) -> Path:
        """In the run's folder."""
        path = self.run / "checkpoints" / name
        FILES.save_checkpoint({"global_step": step}, path)
        return path

    def publish(self, step: int) -> None:
        """In the second place alone."""
        path = self.run.parent / "once.ckpt"
        FILES.save_checkpoint({"global_step": step}, path)
        (content,) = read_hashes(path)
        with path.open("rb") as stream:
            open_published(self.url).put(LAST, stream, content)

    def start(
        self, resume: str | None, *, rank: int = 0, parent: int = 0, mirrored: bool = True
    ) -> Start:
        """Ask."""
        return start_of(
            resume,
            self.run,
            open_published(self.url) if mirrored and not rank else None,
            rank=rank,
            warn=self.told.append,
            environ=self.environ,
            parent=parent,
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """With nothing in it."""
    return Place(tmp_path)


def test_nothing_is_there(place: Place) -> None:
    """A run begins anew, with --resume auto as well; a named checkpoint has to be there."""
    assert place.start(None) == place.start("auto") == ANEW
    for name in ("nowhere.ckpt", f"{place.url}/nowhere.ckpt"):
        with pytest.raises(UsageError, match=r"there is no checkpoint .*nowhere\.ckpt"):
            place.start(name)
    assert place.told == []


@pytest.mark.parametrize(
    ("local", "remote", "source"),
    [(5, 3, "local"), (5, 5, "local"), (5, 8, "remote"), (None, 8, "remote"), (5, None, "local")],
)
def test_the_newer_of_two_places(
    place: Place, local: int | None, remote: int | None, source: str
) -> None:
    """By global step; the run's own folder where they are equal, and it is never changed."""
    if local is not None:
        place.save(local)
    if remote is not None:
        place.publish(remote)
    path, where = place.start("auto")
    if source == "local":
        assert path == place.run / "checkpoints" / LAST
        assert where == str(path)
        assert not (place.run / FETCHED).exists()
    else:
        assert path == place.run / FETCHED
        assert where == f"{place.elsewhere}/{LAST}"
    assert path is not None
    assert FILES.load_checkpoint(path)["global_step"] == max(local or 0, remote or 0)
    assert (place.run / "checkpoints").exists() == (local is not None)


def test_a_broken_one_falls_back_from_place_to_place(place: Place) -> None:
    """What was newer and is broken is named, with what is taken instead."""
    for step in (2, 4):
        place.save(step)
        place.publish(step + 1)
    newest = place.elsewhere / LAST
    newest.write_bytes(newest.read_bytes()[:-1])
    assert place.start("auto").where == str(place.run / "checkpoints" / LAST)
    (line,) = place.told
    assert line.startswith(f"{newest} was damaged: ")
    assert line.endswith(f"; going on from {place.run / 'checkpoints' / LAST}")
    local = place.run / "checkpoints" / LAST
    local.unlink()
    local.write_bytes(b"rubbish")
    assert place.start("auto").where == str(place.elsewhere / PREVIOUS)
    assert len(place.told) == 3
    shutil.rmtree(place.elsewhere)
    assert place.start("auto").where == str(place.run / "checkpoints" / PREVIOUS)
    (place.run / "checkpoints" / PREVIOUS).unlink()
    with pytest.raises(DataError, match="there is no whole checkpoint, start a new run"):
        place.start("auto")


def test_a_new_run_does_not_overwrite_another(place: Place) -> None:
    """Neither in the folder nor in the second place."""
    place.publish(3)
    with pytest.raises(UsageError, match=r"elsewhere holds a run already.*--checkpoint_url"):
        place.start(None)
    assert place.start(None, mirrored=False) == ANEW
    place.save(1)
    with pytest.raises(UsageError, match=r"run holds a run already.*--run FOLDER"):
        place.start(None)


def test_a_named_one_is_taken_and_checked(place: Place) -> None:
    """From a path or a URL, whatever else is newer."""
    path = place.save(3, "best.ckpt")
    place.save(9)
    assert place.start(str(path)) == (path, str(path))
    place.publish(4)
    start = place.start(f"{place.url}/{LAST}")
    assert start == (place.run / FETCHED, f"{place.url}/{LAST}")
    assert FILES.load_checkpoint(place.run / FETCHED)["global_step"] == 4
    for broken, name in ((path, str(path)), (place.elsewhere / LAST, f"{place.url}/{LAST}")):
        broken.write_bytes(broken.read_bytes()[:-1])
        with pytest.raises(DataError, match="was damaged"):
            place.start(name)


def test_what_could_have_been_meant_is_said(place: Place) -> None:
    """By who has mistyped a name, or named the folder."""
    last = place.save(3)
    for typed, meant in (
        (str(last.with_name("lst.ckpt")), f"there is no checkpoint .*; did you mean {last}\\?"),
        (str(last.parent), f"is a folder; did you mean {last}\\?"),
        (str(place.run), f"is a folder; did you mean {last}\\?"),
        (str(place.run.parent), f"is a folder without a {LAST}"),
        ("atuo", r"there is no checkpoint atuo; did you mean auto\?"),
    ):
        with pytest.raises(UsageError, match=meant):
            place.start(typed)
    with (
        pytest.raises(UsageError, match=r"^there is no checkpoint auto$"),
        local_checkpoint("auto"),
    ):
        pass


def test_what_a_killed_run_fetched_is_removed(place: Place) -> None:
    """It is not taken for the run's own."""
    place.run.mkdir()
    (place.run / FETCHED).write_bytes(b"old")
    assert place.start("auto") == ANEW
    assert not (place.run / FETCHED).exists()


def test_ranks_that_lightning_starts_take_the_first_ones_word(place: Place) -> None:
    """And nobody else's: an environment may be handed on to other programs."""
    place.publish(8)
    assert place.start("auto").path == place.run / FETCHED
    me = os.getpid()
    assert place.environ == {INHERITED: f"{me} {place.run / FETCHED}"}
    assert place.start("auto", rank=1, parent=me).path == place.run / FETCHED
    assert place.start("auto", rank=1, parent=me + 1) == ANEW
    assert (place.run / FETCHED).exists()
    place.environ[INHERITED] = f"{me} "
    place.save(3)
    assert place.start("auto", rank=1, parent=me) == ANEW
    forget(place.environ)
    assert place.start("auto", rank=1, parent=me).path == place.run / "checkpoints" / LAST


def test_other_ranks_need_no_file(place: Place) -> None:
    """One that has no such file gets the bytes from the rank that has them."""
    assert place.start("nowhere.ckpt", rank=3).path == Path("nowhere.ckpt")
    assert place.start(f"{place.url}/{LAST}", rank=3).path == placeholder(place.run)
    assert place.start(None, rank=3) == ANEW
    path = place.save(3)
    assert place.start("auto", rank=3).path == path


def test_a_checkpoint_for_a_moment(place: Place) -> None:
    """A path as it is; a URL's is fetched, and gone afterwards."""
    path = place.save(3)
    with local_checkpoint(str(path)) as found:
        assert found == path
    place.publish(4)
    with local_checkpoint(f"{place.url}/{LAST}") as found:
        assert FILES.load_checkpoint(found)["global_step"] == 4
    assert not found.exists()
    with pytest.raises(UsageError, match="there is no checkpoint"), local_checkpoint("nowhere"):
        pass


def test_two_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """The second one waits a moment, and is told who is there; a killed one leaves nothing."""
    warned: list[str] = []
    (tmp_path / "checkpoints").mkdir()
    for name in (".tmp-last.ckpt-abc", ".tmp-last.previous.ckpt-link", "last.ckpt", "mine"):
        (tmp_path / "checkpoints" / name).touch()
    with held(tmp_path, warn=warned.append):
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last.ckpt", "mine"]
        here = re.escape(f"process {os.getpid()} on {socket.gethostname()} trains in {tmp_path}")
        with (
            pytest.raises(UsageError, match=f"^{here}; end it, or choose another folder"),
            held(tmp_path, warn=warned.append, wait_s=0.3),
        ):
            pass
    (line,) = warned
    assert re.match(f"{here}; waiting up to 0.3 s", line)
    with held(tmp_path, warn=warned.append):
        pass
    assert len(warned) == 1


def test_where_nothing_was_done_nothing_is_left(tmp_path: Path) -> None:
    """A mistake in the command makes no folder; one that was there stays."""
    with held(tmp_path / "run", warn=print):
        pass
    assert not (tmp_path / "run").exists()
    with held(tmp_path / "run", warn=print):
        (tmp_path / "run" / "log").touch()
    with held(tmp_path / "run", warn=print):
        (tmp_path / "run" / "log").unlink()
    assert (tmp_path / "run").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """SIGKILL included; and while it lives its successor waits for it."""
    program = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from recipes.start import held\n"
        "with held(Path(sys.argv[1]), warn=print):\n"
        "    print('held', flush=True)\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with held(tmp_path, warn=lambda line: process.kill()):
            assert process.wait(30) == -signal.SIGKILL
