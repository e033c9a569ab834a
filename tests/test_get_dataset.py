"""get_dataset: torchvision's own archives, made small and served here, become ImageFolders."""

import hashlib
import io
import pickle
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, Imagenette

import shard
from scripts import get_dataset
from sharding.dataset import open_splits
from tests.make_images import files_below, image
from tests.ports import free_port

NETTE = {
    f"imagenette2-160/{split}/{wnid}/{wnid}_{i}.JPEG": image(i)
    for split, images in (("train", 3), ("val", 1))
    for wnid in ("n01440764", "n03888257")
    for i in range(images)
}
CIFAR_CLASSES = ["airplane", "automobile", "bird"]
CIFAR_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def archive(files: dict[str, bytes]) -> bytes:
    """A .tar.gz of them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class OldArray:
    """Pickles as a numpy array of 2009 did, whose dtype's switches were integers."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        reconstruct, arguments, (version, shape, _, *rest) = self.array.__reduce__()
        return reconstruct, arguments, (version, shape, OldType(), *rest)


class OldType:
    """The dtype of bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("u1", 0, 1)


def cifar_pixels(batch: str) -> Any:
    """(4, 3072): channel by channel, row by row."""
    return np.random.default_rng(len(batch) * ord(batch[-1])).integers(0, 256, (4, 3072), np.uint8)


def cifar_labels(batch: str) -> list[int]:
    """Each class, the first twice."""
    return [0, 1, 2, 0]


def cifar() -> dict[str, bytes]:
    """CIFAR-10's files by name, with four images each."""
    files = {
        batch: pickle.dumps(
            {"data": OldArray(cifar_pixels(batch)), "labels": cifar_labels(batch)}, protocol=2
        )
        for batch in (*CIFAR_BATCHES, "test_batch")
    }
    return files | {"batches.meta": pickle.dumps({"label_names": CIFAR_CLASSES}, protocol=2)}


def md5(data: bytes) -> str:
    """What torchvision checks."""
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, bytes]], None]]:
    """Where torchvision downloads from, in this test: a server of the files that one puts there.

    The working folder is an empty one.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    nette = archive(NETTE)
    files = cifar()
    cifar_archive = archive({f"cifar-10-batches-py/{name}": data for name, data in files.items()})

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    def publish(changes: dict[str, bytes]) -> None:
        there = {"imagenette2-160.tgz": nette, "cifar-10-python.tar.gz": cifar_archive}
        for name, data in (there | changes).items():
            (folder / name).write_bytes(data)

    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        point(monkeypatch, root, nette, cifar_archive)
        lists = {
            "train_list": [[name, md5(files[name])] for name in CIFAR_BATCHES],
            "test_list": [["test_batch", md5(files["test_batch"])]],
            "meta": CIFAR10.meta | {"md5": md5(files["batches.meta"])},
        }
        for name, value in lists.items():
            monkeypatch.setattr(CIFAR10, name, value)
        yield publish
        server.shutdown()
        thread.join()


def point(monkeypatch: pytest.MonkeyPatch, root: str, nette: bytes, cifar_archive: bytes) -> None:
    """Let torchvision look there for these archives."""
    monkeypatch.setattr(
        Imagenette, "_ARCHIVES", {"160px": (f"{root}/imagenette2-160.tgz", md5(nette))}
    )
    monkeypatch.setattr(CIFAR10, "url", f"{root}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(cifar_archive))


def test_imagenette(
    site: Callable[[dict[str, bytes]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The archive's files, nothing beside them; the command that is printed packs them."""
    site({})
    assert get_dataset.main(["imagenette"]) == 0
    expected = {name.partition("/")[2]: data for name, data in NETTE.items()}
    assert files_below(Path("data/imagenette")) == expected
    assert [path.name for path in Path("data").iterdir()] == ["imagenette"]
    out = capsys.readouterr().out
    assert out.startswith("data/imagenette: 6 training and 2 validation images of 2 classes\n")
    (command,) = re.findall(r"pack it:  python shard\.py (.*)\n", out)
    assert shard.main([*command.split(), "--workers", "1"]) == 0
    assert open_splits("data/imagenette-shards")["train"].manifest.samples == 6
    assert out.endswith("train on it:  python train.py --config recipes/imagenette.yaml\n")


def test_cifar10(
    site: Callable[[dict[str, bytes]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pixel under its class, and packed if that is asked for; labels are CIFAR's own."""
    site({})
    assert get_dataset.main(["cifar10", "small", "--pack"]) == 0
    for split, batches in (("train", CIFAR_BATCHES), ("val", ["test_batch"])):
        pixels = np.concatenate([cifar_pixels(batch) for batch in batches])
        labels = [label for batch in batches for label in cifar_labels(batch)]
        assert len(list(Path("small", split).rglob("*.*"))) == len(labels)
        for number, (row, label) in enumerate(zip(pixels, labels, strict=True)):
            with Image.open(f"small/{split}/{CIFAR_CLASSES[label]}/{number:05}.png") as picture:
                found = np.asarray(picture)
            assert np.array_equal(found, row.reshape(3, 32, 32).transpose(1, 2, 0))
        manifest = open_splits("small-shards")[split].manifest
        assert manifest.classes == tuple(CIFAR_CLASSES)
        assert manifest.samples == len(labels)
    out = capsys.readouterr().out
    assert "pack it" not in out
    assert out.endswith("--config recipes/cifar10.yaml data.root=small-shards\n")


def test_without_network_the_archive_can_be_brought(
    site: Callable[[dict[str, bytes]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error says what is wrong and where to put it; then the same command goes through."""
    nette, brought = archive(NETTE), Path("data/imagenette.download/imagenette2-160.tgz")
    port = free_port()
    point(monkeypatch, f"http://127.0.0.1:{port}", nette, b"")
    assert get_dataset.main(["imagenette"]) == 1
    err = capsys.readouterr().err
    assert f"cannot download http://127.0.0.1:{port}/imagenette2-160.tgz: " in err
    assert "Connection refused" in err
    assert f"bring the archive to {brought} and start the same command again" in err
    assert err.count("\n") == 1
    assert not Path("data/imagenette").exists()
    brought.write_bytes(nette)
    assert get_dataset.main(["imagenette"]) == 0
    assert len(files_below(Path("data/imagenette"))) == len(NETTE)


def test_another_file_is_refused(
    site: Callable[[dict[str, bytes]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A proxy's page instead of the archive: named, status 3; the next try fetches it again."""
    site({"imagenette2-160.tgz": b"<html>Please log in</html>"})
    assert get_dataset.main(["imagenette"]) == 3
    err = capsys.readouterr().err.splitlines()[-1]
    assert "data/imagenette.download/imagenette2-160.tgz, from http://" in err
    assert "is not the archive that torchvision knows" in err
    assert not Path("data/imagenette").exists()
    site({})
    assert get_dataset.main(["imagenette"]) == 0


def test_a_server_that_does_not_have_it(
    site: Callable[[dict[str, bytes]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answer is in the error."""
    assert get_dataset.main(["cifar10"]) == 1
    assert "cannot download" in (err := capsys.readouterr().err)
    assert "404" in err


def test_what_a_killed_run_left_is_not_taken_for_the_whole(
    site: Callable[[dict[str, bytes]], None],
) -> None:
    """Half an extraction has the folder in whose place torchvision would extract nothing more."""
    site({})
    half = Path("data/imagenette.download/imagenette2-160")
    (half / "train/n01440764").mkdir(parents=True)
    (half / "train/n01440764/n01440764_0.JPEG").write_bytes(b"ha")
    assert get_dataset.main(["imagenette"]) == 0
    assert len(files_below(Path("data/imagenette"))) == len(NETTE)


def test_wrong_use(
    site: Callable[[dict[str, bytes]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in use is left alone, and what to do if it is the data set is said."""
    folder = Path("in-use")
    folder.mkdir()
    (folder / "file").write_text("mine")
    assert get_dataset.main(["imagenette", "in-use"]) == 2
    err = capsys.readouterr().err
    assert "in-use is not empty" in err
    assert "python shard.py pack in-use in-use-shards" in err
    assert files_below(Path()) == {"in-use/file": b"mine"}
    assert get_dataset.main(["cifar10", "--size", "full"]) == 2
    assert "only imagenette comes in sizes" in capsys.readouterr().err
