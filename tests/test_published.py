"""model/published.py: checkpoints in a folder and on S3, whole whenever the writer is killed."""

import io
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from model.checkpoint import LAST, PREVIOUS
from model.hashes import BrokenCheckpointError, Content, Hashing
from model.newest import Found, newest, newest_whole
from model.published import Published, Store
from sharding.errors import DataError
from sharding.store import LocalStore, atomic_file


def checkpoint(step: int) -> tuple[bytes, Content]:
    """A checkpoint's bytes, and what they are."""
    stream = io.BytesIO()
    torch.save({"global_step": step, "x": torch.arange(100) + step}, stream)
    hashing = Hashing()
    hashing.write(stream.getvalue())
    return stream.getvalue(), hashing.content(step)


def published(store: Any) -> Published:
    """As train.py makes it."""
    return Published(store, damage=(DataError,))


def put(place: Published, step: int, name: str = LAST) -> None:
    """Publish a checkpoint of a step."""
    data, content = checkpoint(step)
    place.put(name, io.BytesIO(data), content)


def find(place: Published, folder: Path) -> Found:
    """The newest whole one."""
    return newest(place.candidates(folder / "fetched.ckpt", atomic_file))


def test_the_store_holds_what_a_folder_would(store: Store, tmp_path: Path) -> None:
    """The last, the one before, others; copied as it is, a run goes on from it."""
    place = published(store)
    assert place.names() == []
    assert find(place, tmp_path) == (None, [])
    for step in (1, 2, 3):
        put(place, step)
    put(place, 2, "best.ckpt")
    assert sorted(place.names()) == ["best.ckpt", LAST, PREVIOUS]
    found = find(place, tmp_path)
    assert found.taken == (tmp_path / "fetched.ckpt", 3, f"{store.url}/{LAST}")
    assert torch.load(tmp_path / "fetched.ckpt", weights_only=True)["global_step"] == 3

    folder = tmp_path / "copied"
    folder.mkdir()
    for name in store.sizes():
        (folder / name).write_bytes(store.read(name))
    assert newest_whole(folder).path == folder / LAST
    place.remove("best.ckpt")
    assert sorted(store.sizes()) == sorted([LAST, PREVIOUS, f"{LAST}.xxh128", f"{PREVIOUS}.xxh128"])
    place.remove("best.ckpt")  # again: nothing happens


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_a_damaged_object_is_passed_over(store: Store, tmp_path: Path, damage: str) -> None:
    """The one before is taken, what is wrong is said; the next one does not push that out."""
    place = published(store)
    for step in (1, 2):
        put(place, step)
    data = bytearray(store.read(LAST))
    data[len(data) // 2] ^= 1
    store.delete(LAST)
    if damage != "gone":
        with store.create(LAST) as stream:
            stream.write(bytes({"cut": data[:500], "flip": data, "empty": b""}[damage]))
    found = find(place, tmp_path)
    assert found.taken is not None
    assert (found.taken.step, found.taken.where) == (1, f"{store.url}/{PREVIOUS}")
    assert len(found.broken) == (damage != "gone")
    assert all(f"{store.url}/{LAST} was damaged" in line for line in found.broken)
    put(place, 5)
    assert find(place, tmp_path).taken == (tmp_path / "fetched.ckpt", 5, f"{store.url}/{LAST}")
    store.delete(LAST)
    assert find(place, tmp_path).taken == (tmp_path / "fetched.ckpt", 1, f"{store.url}/{PREVIOUS}")


@pytest.mark.parametrize("hashes", [None, b"", b"torn"])
def test_without_hashes_the_sums_inside_decide(
    store: Store, tmp_path: Path, hashes: bytes | None
) -> None:
    """Missing or torn: a whole checkpoint is taken, a damaged one is named by its URL."""
    place = published(store)
    put(place, 4)
    store.delete(f"{LAST}.xxh128")
    if hashes is not None:
        with store.create(f"{LAST}.xxh128") as stream:
            stream.write(hashes)
    assert find(place, tmp_path).taken is not None
    data = store.read(LAST)
    with store.create(LAST) as stream:
        stream.write(data[:-500])
    found = find(place, tmp_path)
    assert found.taken is None
    assert found.broken[0].startswith(f"{store.url}/{LAST} is no whole checkpoint")
    put(place, 5)
    assert find(place, tmp_path).taken is not None


def test_what_is_not_as_promised_is_not_published(store: Store, tmp_path: Path) -> None:
    """A file that changed on the disk: the object before stays."""
    place = published(store)
    put(place, 1)
    data, content = checkpoint(2)
    with pytest.raises(BrokenCheckpointError, match="on its way to"):
        place.put(LAST, io.BytesIO(data[:-1]), content)
    found = find(place, tmp_path)
    assert found.taken is not None
    assert found.taken.step == 1


class KilledError(BaseException):
    """The process is no more."""


class Mortal:
    """A store whose user is killed before or after the n-th request that changes something."""

    def __init__(self, inner: LocalStore, at: int) -> None:
        self._inner = inner
        self._at = at
        self._requests = itertools.count(1)
        self.url = inner.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self) -> None:
        """One more moment at which it may happen."""
        if next(self._requests) == self._at:
            raise KilledError

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Before, in the middle of, and after a write."""
        self.step()
        with self._inner.create(name) as stream:
            yield stream
            self.step()
        self.step()

    def duplicate(self, source: str, target: str) -> None:
        """Before and after a copy."""
        self.step()
        self._inner.duplicate(source, target)
        self.step()


def test_killed_at_each_request(tmp_path: Path) -> None:
    """Always all are whole, and the newest is the new one or the one before.

    Killed twice at the same request, as well: what two have announced may both be there.
    """
    requests = 0
    for at in itertools.count(1):
        inner = LocalStore(tmp_path / str(at))
        for step in (1, 2):
            put(published(inner), step)
        ends = []
        for step in (3, 4):
            store: Any = Mortal(inner, at)
            place = Published(store)
            try:
                put(place, step)
            except KilledError:
                ends.append(step)
            found = newest_whole(inner.root)
            assert found.broken == []
            assert found.taken is not None
            assert found.taken.step in {2, 3, step}
            assert find(published(inner), tmp_path).taken is not None
            for name in published(inner).names():
                fetched = published(inner).fetch(name, tmp_path / "one", atomic_file)
                loaded = torch.load(fetched.path, weights_only=True)
                assert fetched.step == loaded["global_step"]
        put(published(inner), 5)
        assert newest_whole(inner.root).broken == []
        if not ends:
            break
        requests = at
    assert requests > 15


def test_one_that_is_replaced_meanwhile_is_fetched_again(tmp_path: Path) -> None:
    """Evaluation beside a running training: the next one is read instead."""

    class Replaced(LocalStore):
        times = 0

        def open(self, name: str, size: int | None = None) -> Any:
            if self.times < 2:
                self.times += 1
                put(published(LocalStore(self.root)), 10 + self.times)
            return super().open(name)

    store = Replaced(tmp_path / "store")
    put(published(LocalStore(store.root)), 1)
    found = published(store).fetch(LAST, tmp_path / "f", atomic_file)
    assert (found.step, store.times) == (12, 2)


def test_nothing_to_fetch(store: Store, tmp_path: Path) -> None:
    """FileNotFoundError, and nothing on the disk."""
    with pytest.raises(FileNotFoundError):
        published(store).fetch(LAST, tmp_path / "f", atomic_file)
    assert not (tmp_path / "f").exists()


def test_sweeping_leaves_alone_what_others_write_there(tmp_path: Path) -> None:
    """Only halves of checkpoints go."""
    for name in ("last.ckpt-abc", "last.ckpt.xxh128-x_1", "big.tar-abc", "notes-1"):
        (tmp_path / f".tmp-{name}").write_bytes(b"half")
    published(LocalStore(tmp_path)).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-big.tar-abc", ".tmp-notes-1"]


def test_a_cut_one_does_not_take_the_place_of_the_one_before(tmp_path: Path) -> None:
    """Though nobody has read it: its size tells."""
    store = LocalStore(tmp_path)
    for step in (1, 2):
        put(published(store), step)
    os.truncate(tmp_path / LAST, 100)
    put(published(store), 3)
    assert published(store).fetch(PREVIOUS, tmp_path / "one", atomic_file).step == 1
    assert published(store).fetch(LAST, tmp_path / "one", atomic_file).step == 3
