"""train.py and eval.py as a user runs them: results, files, and one line for each mistake."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import eval as eval_program
import train as train_program
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_images import image_folder, pack_folder

ROOT = Path(__file__).parents[1]


def run(
    program: str, *arguments: str | Path | int, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        [sys.executable, ROOT / program, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def one_line(stderr: str) -> str:
    """The only line of an error message; no traceback."""
    (line,) = stderr.splitlines()
    return line


@pytest.fixture
def trained(small_recipe: Path, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "run"
    assert train_program.main(["--config", str(small_recipe), "--run", str(folder)]) == 0
    return folder


def test_a_run_leaves_checkpoints_recipe_logs_and_trace(trained: Path, small_recipe: Path) -> None:
    """last.ckpt, the best ones named by accuracy, the resolved recipe, a CSV with the metrics."""
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names[0] == "last.ckpt"
    assert [name.partition("-val_acc1=")[0] for name in names[1:]] == [
        "resnet10-epoch=0",
        "resnet10-epoch=1",
    ]
    head = (trained / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    metrics = {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "acc1", "acc5")}
    assert metrics | {"lr", "step", "epoch"} <= set(head)
    assert {"data/images_per_s", "data/wait_fraction", "data/cache_hits"} <= set(head)
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["trainer"]["batch_size"] == 8
    assert len((trained / "samples-rank0.jsonl").read_text().splitlines()) == 12
    assert torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12


def test_evaluation_agrees_with_training_on_one_and_two_processes(
    trained: Path, small_recipe: Path
) -> None:
    """eval.py gives the accuracy that the last validation logged, over all 13 images."""
    with (trained / "csv" / "version_0" / "metrics.csv").open() as stream:
        last = [row for row in csv.DictReader(stream) if row["val/acc1"]][-1]
    for devices in (1, 2):
        done = run(
            "eval.py", "--config", small_recipe, "--checkpoint", trained / "checkpoints/last.ckpt",
            "--json", f"trainer.devices={devices}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout.splitlines()[-1])
        assert facts["images"] == facts["val/seen"] == 13
        assert facts["val/acc1"] == pytest.approx(float(last["val/acc1"]), abs=1e-6)
        assert facts["val/loss"] == pytest.approx(float(last["val/loss"]), rel=1e-4)


def test_a_run_is_not_overwritten(
    trained: Path, small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Starting again in a run's folder is refused with what to do; --resume auto goes on."""
    again = ["--config", str(small_recipe), "--run", str(trained)]
    assert train_program.main(again) == 2
    assert "holds a run already; go on with it (--resume auto)" in one_line(capsys.readouterr().err)
    assert train_program.main([*again, "--resume", "auto", "--epochs", "3"]) == 0
    last = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 18


def test_a_corrupt_byte_ends_the_run_with_the_samples_name(
    small_recipe: Path, tmp_path: Path
) -> None:
    """One line with shard, offset and key, exit status 3, with workers too."""
    counts = {"a": 20, "b": 20}
    image_folder(tmp_path / "images", counts)
    split = pack_folder(tmp_path / "images", tmp_path / "bad" / "train", max_samples=9)
    val = tmp_path / "bad" / "val"
    pack_folder(image_folder(tmp_path / "more", {"a": 2, "b": 2}), val)
    index = split.read_index(1)
    offset = int(index.table["offset"][4])
    tar = tmp_path / "bad" / "train" / "train-000001.tar"
    with tar.open("r+b") as stream:
        stream.seek(offset + 20)
        byte = stream.read(1)
        stream.seek(offset + 20)
        stream.write(bytes([byte[0] ^ 1]))
    for workers in (0, 2):
        done = run(
            "train.py", "--config", small_recipe, "--run", tmp_path / f"run{workers}",
            "--num_workers", workers, f"data.root={tmp_path / 'bad'}",
        )  # fmt: skip
        assert done.returncode == 3
        line = one_line(done.stderr)
        assert f"{tar}, offset {offset}, sample {index.key(4)}: the bytes were changed" in line


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--config", "nowhere.yaml"], 2, "there is no recipe nowhere.yaml"),
        (["trainer.epoch=1"], 2, "unknown key trainer.epoch; did you mean trainer.epochs?"),
        (["--epochs", "ten"], 2, "'ten' of type 'str' could not be converted to Integer"),
        (["--resume", "nowhere.ckpt"], 2, "there is no checkpoint nowhere.ckpt"),
        (["data.root=/nowhere"], 3, "/nowhere/train has no manifest.json"),
        (["--batch_size", "100"], 2, "51 samples are fewer than one global batch of 100"),
        (["data.format=imagefolder", "data.root=/nowhere"], 2, "/nowhere/train is no folder"),
    ],
)
def test_each_mistake_is_one_line(
    small_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    """The line says what was wrong, with the value; nothing is left behind."""
    run_folder = tmp_path / "run"
    config = [] if "--config" in arguments else ["--config", str(small_recipe)]
    assert train_program.main([*config, "--run", str(run_folder), *arguments]) == status
    assert message in one_line(capsys.readouterr().err)
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("seed=5", "seed is 0, this run's is 5"),
        ("data.lanes=3", "lanes is 4, this run's is 3"),
        ("trainer.batch_size=4", "global_batch is 8, this run's is 4"),
        ("data.format=imagefolder", "digest is"),
    ],
)
def test_resuming_something_else_is_refused(
    trained: Path,
    small_recipe: Path,
    small_images: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    name: str,
) -> None:
    """Another seed, order, batch or data set: the error names both values."""
    overrides = [override, "trainer.epochs=3"]
    if "imagefolder" in override:
        overrides.append(f"data.root={small_images}")
    status = train_program.main(
        ["--config", str(small_recipe), "--run", str(trained), "--resume", "auto", *overrides]
    )
    assert status == 2
    assert name in one_line(capsys.readouterr().err)


def test_a_checkpoint_of_another_network_is_refused(
    trained: Path, small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval.py says that the checkpoint does not fit, in one line."""
    status = eval_program.main(
        ["--config", str(small_recipe), "--checkpoint", str(trained / "checkpoints/last.ckpt"),
         "model.name=resnet18"]
    )  # fmt: skip
    assert status == 2
    assert "does not fit this recipe" in one_line(capsys.readouterr().err)


def test_without_arguments_train_says_what_to_type() -> None:
    """The usage with examples, exit status 2."""
    done = run("train.py")
    assert done.returncode == 2
    assert "python train.py --config recipes/demo.yaml" in done.stderr


def test_imagefolder_trains_the_same_weights(
    small_recipe: Path, small_images: Path, trained: Path, tmp_path: Path
) -> None:
    """data.format=imagefolder: same batches, and so the same network, bit for bit."""
    folder = tmp_path / "unpacked"
    status = train_program.main(
        ["--config", str(small_recipe), "--run", str(folder), "data.format=imagefolder",
         f"data.root={small_images}", "data.packing.max_samples=9"]
    )  # fmt: skip
    assert status == 0
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (trained, folder)
    ]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_training_from_s3(
    trained: Path, small_shards: Path, small_recipe: Path, tmp_path: Path
) -> None:
    """The same recipe from S3, with workers and a cache: sample for sample, and the same losses."""
    root = f"s3://{BUCKET}/{tmp_path.name}"
    environment = {"AWS_ENDPOINT_URL": s3_endpoint()}
    copied = run("shard.py", "copy", small_shards, root, **environment)
    assert copied.returncode == 0, copied.stderr
    done = run(
        "train.py", "--config", small_recipe, "--run", tmp_path / "again", f"data.root={root}",
        "data.num_workers=2", f"data.cache_dir={tmp_path / 'cache'}", **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [
        (folder / "samples-rank0.jsonl").read_text() for folder in (trained, tmp_path / "again")
    ]
    assert lines[0] == lines[1]
    losses = []
    for folder in (trained, tmp_path / "again"):
        with (folder / "csv" / "version_0" / "metrics.csv").open() as stream:
            losses.append(
                [row["train/loss"] for row in csv.DictReader(stream) if row["train/loss"]]
            )
    assert losses[0] == losses[1]
    evaluated = run(
        "eval.py", "--config", small_recipe, f"data.root={root}",
        "--checkpoint", tmp_path / "again/checkpoints/last.ckpt", "--json",
        f"data.cache_dir={tmp_path / 'cache'}", **environment,
    )  # fmt: skip
    assert json.loads(evaluated.stdout.splitlines()[-1])["images"] == 13
    assert len(list((tmp_path / "cache").iterdir())) == 2  # train and val
