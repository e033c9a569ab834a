"""What several test files share: one small packed data set, and a recipe that trains on it."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

import shard
from sharding.dataset import PackedSplit
from sharding.manifest import Packing
from sharding.pack import Job, pack
from sharding.s3 import S3Store
from sharding.source import scan
from sharding.store import LocalStore, Store
from tests.fault_proxy import BUCKET, FaultProxy, s3_endpoint
from tests.make_images import files_below, image_folder, pack_folder

CLASSES = 3
Call = Callable[..., tuple[int, str, str]]

# For moto, and before any process is forked: loader workers know what was set when their server
# began, whichever test that was.
if "SHARDSTREAM_TEST_S3_ENDPOINT" not in os.environ:
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing")


# In the background of a shell this process ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder with 51 training and 13 validation images of three classes."""
    root = tmp_path_factory.mktemp("images")
    image_folder(root / "train", {"a": 20, "b": 17, "c": 14})
    image_folder(root / "val", {"a": 5, "b": 4, "c": 4}, first=100)
    return root


@pytest.fixture(scope="session")
def small_shards(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed: shards of up to 9 samples."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        listing = scan(small_images / split)
        store, packing = LocalStore(root / split), Packing(max_samples=9)
        pack(Job(listing=listing, store=store, split=split, packing=packing), workers=1)
    return root


@pytest.fixture
def small_recipe(small_shards: Path, tmp_path: Path) -> Path:
    """A recipe that trains a small ResNet on the small shards, 6 steps an epoch, two epochs."""
    return write_recipe(tmp_path / "small.yaml", small_shards)


@pytest.fixture
def split(tmp_path: Path) -> PackedSplit:
    """Six samples of two classes in three shards, packed/ of source/."""
    source = image_folder(tmp_path / "source", {"a": 3, "b": 3})
    return pack_folder(source, tmp_path / "packed", max_samples=2)


@pytest.fixture(scope="session")
def images_48(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose train/ has one image for each of 48 shards of one sample."""
    root = tmp_path_factory.mktemp("images_48")
    image_folder(root / "train", {"a": 20, "b c": 20, "été": 8})
    return root


@pytest.fixture(scope="session")
def packed_48(images_48: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed packer makes of `images_48`: every file's bytes."""
    destination = tmp_path_factory.mktemp("packed_48")
    pack_folder(images_48 / "train", destination, max_samples=1)
    return files_below(destination)


def write_recipe(path: Path, shards: Path) -> Path:
    """The same for fixtures that live longer."""
    values = {
        "name": "small",
        "data": {
            "root": str(shards),
            "num_workers": 0,
            "train_size": 8,
            "val_resize": 8,
            "val_size": 8,
            "lanes": 4,
        },
        "model": {"name": "resnet10", "small_stem": True},
        "optim": {"lr": 0.05},
        "schedule": {"warmup_epochs": 1},
        "trainer": {
            "accelerator": "cpu",
            "epochs": 2,
            "batch_size": 8,
            "log_every_n_steps": 1,
            "checkpoint_every_n_steps": 2,
            "trace_samples": True,
        },
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultProxy]:
    """The proxy before the S3 server, with no faults planned."""
    with FaultProxy(s3_endpoint()) as running:
        yield running


@pytest.fixture
def folder() -> str:
    """URL of a prefix on S3 that nothing uses."""
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, folder: str) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return LocalStore(tmp_path / "new" / "a store")
    return S3Store(f"{folder}/a store", endpoint=s3_endpoint())


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in this process; gives its exit status, output and errors."""

    def run(line: str, *more: str) -> tuple[int, str, str]:
        status: object = None
        try:
            status = shard.main([*line.split(), *more])
        except SystemExit as stop:  # argparse
            status = stop.code
        assert isinstance(status, int)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def call_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> Call:
    """`call` with one worker, in a folder with an ImageFolder `in`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["shard.py"])
    image_folder(tmp_path / "in/train", {"a": 9, "b": 7})
    image_folder(tmp_path / "in/val", {"b": 3}, first=50)
    return lambda line: call(line, *(["--workers", "1"] if "info" not in line else []))


def assert_refused(call_in: Call, line: str, message: str) -> None:
    """The line ends with one line that says what is wrong, status 2 or 3, and no tar in out/."""
    status, _, err = call_in(line)
    assert status in {2, 3}
    assert message in err
    assert err.count("\n") == 1
    assert not list(Path().glob("out/**/*.tar"))
