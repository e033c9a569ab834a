"""The doctor: what would stop a run is found before it, with the value and what to do."""

import io
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_program
from recipes.build import build_data, build_model
from recipes.checks import Finding, exit_status
from recipes.doctor import checkpoint_bytes, examine
from recipes.schema import load_recipe
from sharding.dataset import PackedSplit
from sharding.store import open_store
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_images import image_folder, pack_folder
from tests.ports import free_port

MB, GB = 10**6, 10**9


def names(found: list[Finding], level: str) -> list[str]:
    """Of the findings of this level."""
    return [finding.name for finding in found if finding.level == level]


Examine = Callable[..., list[Finding]]


@pytest.fixture
def examined(small_recipe: Path, tmp_path: Path) -> Examine:
    """Examine the small recipe with overrides."""

    def call(*overrides: str, run: Path | None = None, **environ: str) -> list[Finding]:
        recipe = load_recipe(small_recipe, overrides)
        run = run or tmp_path / "run"
        return list(examine(recipe, run, checkpoint=lambda: None, environ=environ))

    return call


def test_a_run_that_can_start(examined: Examine, tmp_path: Path) -> None:
    """Nothing is wrong, and nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    found = examined()
    assert exit_status(found) == 0
    assert [finding.name for finding in found] == [
        "devices", "shared memory", "decoder", "train", "val", "steps", "cores", "memory",
        "open files", "run folder", "checkpoint",
    ]  # fmt: skip
    train = next(finding for finding in found if finding.name == "train")
    assert train.text.startswith("51 images of 3 classes in 6 shards, digest ")
    assert train.text.endswith("; 3 read, checked and decoded")
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_data_is_found(examined: Examine, tmp_path: Path) -> None:
    """A changed byte of the first sample, a missing split: status 3, with the place."""
    for split in ("train", "val"):
        pack_folder(image_folder(tmp_path / "in" / split, {"a": 9, "b": 9}), tmp_path / "d" / split)
    root = f"data.root={tmp_path / 'd'}"
    assert exit_status(examined(root)) == 0
    tar = next((tmp_path / "d" / "val").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    at = int(PackedSplit.open(str(tmp_path / "d" / "val")).read_index(0).table["offset"][0])
    data[at + 20] ^= 1
    tar.write_bytes(data)
    found = examined(root)
    assert (names(found, "error"), exit_status(found)) == (["data"], 3)
    assert f"{tar}, offset {at}" in str(found)
    (tmp_path / "d" / "train" / "manifest.json").unlink()
    found = examined(root)
    assert (names(found, "error"), exit_status(found)) == (["data"], 3)
    assert "has no manifest.json" in str(found)


def test_what_is_no_image_is_found(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample whose bytes are right and no image."""
    monkeypatch.setattr("loaders.reader.ShardReader.read", lambda *_: b"no image")
    found = examined()
    assert (names(found, "error"), exit_status(found)) == (["data"], 3)
    assert "cannot be decoded" in str(found)


@pytest.mark.parametrize(
    ("overrides", "name", "text"),
    [
        (["trainer.batch_size=52"], "data", "fewer than one global batch of 52"),
        (["data.repeats=3"], "data", "not divisible by 1 processes x 3 repeats"),
        (["trainer.accelerator=gpu", "trainer.devices=2"], "devices", "1 GPUs found, 2 asked for"),
        (["data.prefetch=1000000", "data.num_workers=9"], "memory", "lower data.num_workers"),
    ],
)
def test_wrong_use_is_found(
    examined: Examine, monkeypatch: pytest.MonkeyPatch, overrides: list[str], name: str, text: str
) -> None:
    """Status 2, at the check of this name; on a machine with one GPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    found = examined(*overrides)
    assert (names(found, "error"), exit_status(found)) == ([name], 2)
    assert text in str(found)


def test_places_are_tried(examined: Examine, tmp_path: Path) -> None:
    """A run's folder and a cache that cannot be written; one of a cache that can."""
    (tmp_path / "file").touch()
    found = examined(f"data.cache_dir={tmp_path / 'file'}", run=tmp_path / "file" / "run")
    assert names(found, "error") == ["cache", "run folder"]
    found = examined(f"data.cache_dir={tmp_path / 'c'}", "data.cache_gb=0.001")
    assert names(found, "error") == []
    assert "cache" in [finding.name for finding in found]


def test_packages(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named where the recipe needs it, as an error where it would stop."""
    monkeypatch.setattr("recipes.doctor.find_spec", lambda name: None)
    found = examined("optim.lr=auto", "logging.wandb=true")
    assert names(found, "error") == ["packages"]
    assert "plots" in str(next(f for f in found if f.level == "error"))
    assert "packages" in names(found, "warning")


def test_the_rendezvous(examined: Examine) -> None:
    """A port that is taken, one that is none, one that is free; torchrun's own is not looked at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        found = examined(**taken)
        assert (names(found, "error"), exit_status(found)) == (["rendezvous"], 2)
        assert "is taken; set MASTER_ADDR" in str(found)
        assert names(examined(**taken, TORCHELASTIC_RUN_ID="7"), "error") == []
    assert "rendezvous" in names(examined(**taken), "ok")
    assert names(examined(MASTER_ADDR="127.0.0.1", MASTER_PORT="x"), "error") == ["rendezvous"]


@pytest.fixture
def on_s3(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a copy of the small shards."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    url = f"s3://{BUCKET}/{tmp_path.name}-{time.time_ns()}"
    for split in ("train", "val"):
        source, target = (open_store(f"{root}/{split}") for root in (small_shards, url))
        for name in source.sizes():
            with target.create(name) as stream:
                stream.write(source.read(name))
    return url


def test_shards_on_s3(
    examined: Examine, on_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Access, the clock by the service's answer, and the cache on the node."""
    options = [f"data.root={on_s3}", f"data.cache_dir={tmp_path / 'c'}", "data.cache_gb=0.01"]
    found = examined(*options)
    assert names(found, "error") == []
    for name in ("clock", "store", "train", "val", "cache"):
        assert name in names(found, "ok")
    now = time.time
    monkeypatch.setattr("recipes.doctor.time.time", lambda: now() + 1000)
    found = examined(*options)
    assert (names(found, "error"), exit_status(found)) == (["clock"], 2)
    assert "data" not in [finding.name for finding in found]


@pytest.mark.parametrize(
    ("root", "status", "text"),
    [
        ("s3://no-such-bucket-of-ours/x", 2, "there is no such bucket"),
        (f"s3://{BUCKET}/nothing-here", 3, "there is no such object"),
    ],
)
def test_what_is_wrong_on_s3(
    examined: Examine, monkeypatch: pytest.MonkeyPatch, root: str, status: int, text: str
) -> None:
    """The store's own word, and no look at the data."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    found = examined(f"data.root={root}")
    assert (names(found, "error"), exit_status(found)) == (["store"], status)
    assert text in str(found)


def test_a_service_that_does_not_answer(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests, not the minutes that a run would try."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    found = examined("data.root=s3://bucket/x")
    assert names(found, "error") == ["store"]
    assert "Connection refused" in str(found)
    assert "3 requests" in str(found)


@pytest.mark.parametrize(
    "overrides", [[], ["optim.name=lamb"], ["optim.momentum=0"]], ids=["sgd", "lamb", "plain"]
)
def test_the_size_of_a_checkpoint(small_recipe: Path, overrides: list[str]) -> None:
    """Within a hundredth of what the weights and the optimizer's state take after a step."""
    recipe = load_recipe(small_recipe, overrides)
    model = build_model(recipe, build_data(recipe))
    optimizer: Any = model.configure_optimizers()
    for parameter in model.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    assert checkpoint_bytes(recipe, 3) == pytest.approx(len(stream.getvalue()), rel=0.01)


def test_the_average_is_part_of_a_checkpoint(small_recipe: Path) -> None:
    """With ema_decay there are the weights twice."""
    plain, averaged = (
        checkpoint_bytes(load_recipe(small_recipe, [f"trainer.ema_decay={decay}"]), 3)
        for decay in (0, 0.9)
    )
    assert averaged == pytest.approx(1.5 * plain, rel=0.01)


def test_the_command(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a check and a status; a run that is there already is found; nothing is made."""
    arguments = ["--config", str(small_recipe), "--run", str(tmp_path / "run"), "--doctor"]
    assert train_program.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"ok       {'checkpoint':15}from scratch"
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"x")
    assert train_program.main(arguments) == 2
    assert "holds a run already; go on with it" in capsys.readouterr().out
    assert train_program.main([*arguments, "--resume", "auto"]) == 3
