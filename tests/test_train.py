"""train.py and eval.py as a user runs them: results, files, and one line for each mistake."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import eval as eval_program
import shard
import train as train_program
from sharding.s3 import S3Store
from tests.conftest import write_recipe
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_images import image_folder, pack_folder
from tests.runs import one_line, run


@pytest.fixture(scope="module")
def finished(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: nothing that counts may change in it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "small.yaml", small_shards)
    assert train_program.main(["--config", str(recipe), "--run", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def trained(small_recipe: Path, tmp_path: Path) -> Path:
    """The folder of a finished run that may go on."""
    folder = tmp_path / "run"
    assert train_program.main(["--config", str(small_recipe), "--run", str(folder)]) == 0
    return folder


def test_a_run_leaves_checkpoints_recipe_logs_and_trace(finished: Path, small_recipe: Path) -> None:
    """last.ckpt, the best ones named by accuracy, the resolved recipe, a CSV with the metrics."""
    names = sorted(path.name for path in (finished / "checkpoints").glob("*.ckpt"))
    assert names[0] == "last.ckpt"
    assert names[1] == "last.previous.ckpt"
    assert [name.partition("-val_acc1=")[0] for name in names[2:]] == [
        "resnet10-epoch=0",
        "resnet10-epoch=1",
    ]
    head = (finished / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    metrics = {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "acc1", "acc5")}
    assert metrics | {"lr", "step", "epoch"} <= set(head)
    assert {"data/images_per_s", "data/wait_fraction", "data/cache_hits"} <= set(head)
    assert yaml.safe_load((finished / "recipe.yaml").read_text())["trainer"]["batch_size"] == 8
    assert len((finished / "samples-rank0.jsonl").read_text().splitlines()) == 12
    assert (
        torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    )


def test_evaluation_agrees_with_training_on_one_and_two_processes(
    finished: Path, small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval.py gives the accuracy that the last validation logged, over all 13 images."""
    with (finished / "csv" / "version_0" / "metrics.csv").open() as stream:
        last = [row for row in csv.DictReader(stream) if row["val/acc1"]][-1]
    arguments = [
        "--config",
        str(small_recipe),
        "--checkpoint",
        str(finished / "checkpoints/last.ckpt"),
    ]
    capsys.readouterr()
    assert eval_program.main([*arguments, "--json"]) == 0
    two = run("eval.py", *arguments, "--json", "trainer.devices=2")
    assert two.returncode == 0, two.stderr
    for out in (capsys.readouterr().out, two.stdout):
        facts = json.loads(out.splitlines()[-1])
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
    capsys.readouterr()
    assert train_program.main([*again, "--resume", "auto", "--epochs", "3"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.startswith(f"nothing to do: {trained}/checkpoints/last.ckpt is of step 18, and the")
    assert {path.name for path in (trained / "csv").iterdir()} == {"version_0", "version_1"}


def test_the_doctor_looks_into_the_checkpoint(
    finished: Path, small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says where the run goes on, or why it cannot, or that there is nothing left to do."""
    examine = [
        "--config",
        str(small_recipe),
        "--run",
        str(finished),
        "--doctor",
        "--resume",
        "auto",
    ]
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    for more, status, said in (
        ([], 0, "warning +.*last.ckpt, epoch 1, step 12: the run has ended; --epochs goes further"),
        (["--epochs", "3"], 0, "warning +.*, step 12; with other values: trainer.epochs 2 -> 3$"),
        (
            ["trainer.batch_size=4"],
            2,
            "error +.* cannot resume: the checkpoint's global_batch",
        ),
        (["seed=9"], 2, "error +.* cannot resume: the checkpoint's seed is 0"),
        (["model.name=resnet18"], 2, "error +.*last.ckpt is of another model, it has no network.l"),
        (
            ["--resume", f"{tmp_path}/weights.pt"],
            3,
            "error +.*weights.pt is no checkpoint",
        ),
    ):
        assert train_program.main([*examine, *more]) == status
        found = capsys.readouterr().out.splitlines()[-1]
        assert re.match(said, found), found


def test_a_corrupt_byte_ends_the_run_with_the_samples_name(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    common = [
        "--config",
        str(small_recipe),
        f"data.root={tmp_path}/bad",
        "--run",
        f"{tmp_path}/run",
    ]
    done = run("train.py", *common, "--num_workers", 2)
    assert train_program.main([*common, "--num_workers", "0"]) == done.returncode == 3
    for errors in (done.stderr, capsys.readouterr().err):
        line = one_line(errors)
        assert f"{tar}, offset {offset}, sample {index.key(4)}: the bytes were changed" in line
    done = run("train.py", *common, "--num_workers", 2, "data.max_bad_samples=9", "--epochs", 1)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert all(f"warning: {tar}, offset {offset}, sample {index.key(4)}: the b" in x for x in lines)
    assert f"sample {index.key(5)} takes its place (1 of 9 that" in lines[0]
    assert len(lines) <= 2  # workers run on into the next epoch
    trained = (tmp_path / "run/samples-rank0.jsonl").read_text()
    assert f'"{index.key(4)}"' not in trained
    assert f'"{index.key(5)}"' in trained
    with (tmp_path / "run/csv/version_0/metrics.csv").open() as stream:
        assert [row["data/substituted"] for row in csv.DictReader(stream)][-1] in {"1.0", "2.0"}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--config", "nowhere.yaml"], 2, "there is no recipe nowhere.yaml"),
        (["trainer.epoch=1"], 2, "unknown key trainer.epoch; did you mean trainer.epochs?"),
        (
            ["--epochs", "ten"],
            2,
            "trainer.epochs=ten: trainer.epochs must be an integer, got 'ten'",
        ),
        (["--resume", "nowhere.ckpt"], 2, "there is no checkpoint nowhere.ckpt"),
        (["trainer.accelerator=gpu", "--devices", "99"], 2, "GPUs found, 99 asked for"),
        (["--resume", "Auto"], 2, "there is no checkpoint Auto; did you mean auto?"),
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
        ("trainer.batch_size=4", "this run's is 4; --global_batch_size 8 goes on with it; resume"),
        ("data.format=imagefolder", "data set (its digest) is"),
    ],
)
def test_resuming_something_else_is_refused(
    finished: Path,
    small_recipe: Path,
    small_images: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    name: str,
) -> None:
    """Another seed, order, batch or data set: the error names both values."""
    overrides, recipe = [override, "trainer.epochs=3"], (finished / "recipe.yaml").read_text()
    if "imagefolder" in override:
        overrides.append(f"data.root={small_images}")
    status = train_program.main(
        ["--config", str(small_recipe), "--run", str(finished), "--resume", "auto", *overrides]
    )
    assert status == 2
    assert name in one_line(capsys.readouterr().err)
    assert (finished / "recipe.yaml").read_text() == recipe


def test_a_checkpoint_of_another_network_is_refused(
    finished: Path, small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval.py and train.py say that the checkpoint does not fit, or is none, in one line."""
    last, common = finished / "checkpoints/last.ckpt", ["--config", str(small_recipe)]
    other = [*common, "model.name=resnet18"]
    assert eval_program.main([*other, "--checkpoint", str(last)]) == 2
    line = one_line(capsys.readouterr().err)
    assert "does not fit this recipe: it has no network.layer1.1.bn1.bias; is it of another" in line
    run_folder = ["--run", str(tmp_path / "run")]
    assert train_program.main([*other, *run_folder, "--resume", str(last)]) == 2
    message = r"cannot resume: the checkpoint is of another model, it has no network\.layer1\.1"
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    weights = tmp_path / "weights.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, weights)
    assert train_program.main([*common, *run_folder, "--resume", str(weights)]) == 3
    assert "weights.pt is no checkpoint of a run" in one_line(capsys.readouterr().err)


def test_a_file_is_no_folder_for_a_run(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, whatever was to be done, and stays."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        for more in ([], ["--doctor"], ["--find_lr"]):
            line = ["--config", str(small_recipe), "--run", str(tmp_path / name), *more]
            assert train_program.main(line) == 2
            assert f"{name} is no folder; choose another" in one_line(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_without_arguments_train_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    """The usage with examples, exit status 2."""
    with pytest.raises(SystemExit, match="2"):
        train_program.main([])
    assert "python train.py --config recipes/demo.yaml" in capsys.readouterr().err


def test_imagefolder_trains_the_same_weights(
    small_recipe: Path, small_images: Path, finished: Path, tmp_path: Path
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
        for run in (finished, folder)
    ]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_training_from_s3(
    small_shards: Path,
    small_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same recipe from S3, with a cache: sample for sample, and the same losses to the bit."""
    remote = f"s3://{BUCKET}/{tmp_path.name}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    assert shard.main(["copy", str(small_shards), remote]) == 0
    traces, losses = [], []
    for name, root in (("local", small_shards), ("again", remote)):
        arguments = [
            *("--config", str(small_recipe), "--run", str(tmp_path / name), f"data.root={root}"),
            *("data.num_workers=2", f"data.cache_dir={tmp_path / name / 'cache'}"),
        ]
        assert train_program.main(arguments) == 0
        traces.append((tmp_path / name / "samples-rank0.jsonl").read_text())
        with (tmp_path / name / "csv" / "version_0" / "metrics.csv").open() as stream:
            losses.append([row["train/loss"] for row in csv.DictReader(stream)])
    assert traces[0] == traces[1]
    assert losses[0] == losses[1]
    capsys.readouterr()
    arguments = [
        *("--config", str(small_recipe), f"data.root={remote}", "--json"),
        *("--checkpoint", str(tmp_path / "again/checkpoints/last.ckpt")),
        f"data.cache_dir={tmp_path / 'again/cache'}",
    ]
    assert eval_program.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 13
    assert len(list((tmp_path / "again/cache").iterdir())) == 2  # train and val


def test_checkpoints_on_s3_outlive_the_disk(
    small_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run's folder is lost; another machine goes on from S3, with the same weights.

    A new run there is refused, eval.py reads from there, and what differs of the recipe is named.
    """
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    url = f"s3://{BUCKET}/{tmp_path.name}/run"
    common = ["--config", str(small_recipe), "schedule.name=constant"]
    for name, more in (("a", ["--checkpoint_url", url, "--epochs", "1"]), ("whole", [])):
        assert train_program.main([*common, "--run", str(tmp_path / name), *more]) == 0
    shutil.rmtree(tmp_path / "a")
    capsys.readouterr()

    again = [*common, "--run", str(tmp_path / "a"), "--checkpoint_url", url]
    assert train_program.main(again) == 2
    assert f"{url} holds a run already; go on with it" in one_line(capsys.readouterr().err)
    assert train_program.main([*again, "--resume", "auto"]) == 0
    shown = capsys.readouterr()
    assert f"resuming from {url}/last.ckpt" in shown.out
    assert "another recipe: trainer.epochs 1 -> 2;" in one_line(shown.err)
    lasts = [
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in ("whole", "a")
    ]
    for name, value in lasts[0]["state_dict"].items():
        assert torch.equal(lasts[1]["state_dict"][name], value)
    evaluated = ["--config", str(small_recipe), "--json", "--checkpoint", f"{url}/last.ckpt"]
    assert eval_program.main(evaluated) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["val/seen"] == 13
    assert train_program.main([*again, "--resume", f"{url}/last.ckpt", "--epochs", "3"]) == 0
    assert "going on" not in capsys.readouterr().err
    last = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 18
    store = S3Store(url)
    best = [name for name in store.sizes() if "val_acc1" in name and name.endswith(".ckpt")]
    assert len(best) == 3  # also where one was of before the disk was lost


def test_a_checkpoint_says_of_what_run_it_is(finished: Path) -> None:
    """The resolved recipe, the data set's digest, and where the loader was."""
    last = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    plain = json.loads(json.dumps(last["recipe"]))  # lists for tuples, as YAML has them
    assert plain == yaml.safe_load((finished / "recipe.yaml").read_text())
    digest = last["ImageNetData"]["digest"]
    assert len(digest) == 32
    previous = torch.load(finished / "checkpoints" / "last.previous.ckpt", weights_only=True)
    (loader,) = previous["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (loader["epoch"], loader["position"], loader["digest"]) == (1, 48, digest)


def test_a_broken_checkpoint_is_passed_over(
    trained: Path, small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--resume auto` takes the newest whole one and says so; a broken one is refused by name."""
    last = trained / "checkpoints/last.ckpt"
    os.truncate(last, 1000)
    arguments = ["--config", str(small_recipe), "--run", str(trained), "--epochs", "3"]
    assert train_program.main([*arguments, "--resume", str(last)]) == 3
    assert "last.ckpt was damaged" in one_line(capsys.readouterr().err)
    assert train_program.main([*arguments, "--resume", "auto"]) == 0
    shown = capsys.readouterr()
    assert "warning: " in shown.err
    assert "going on from" in shown.err
    assert "resuming from" in shown.out
    assert torch.load(last, weights_only=True)["global_step"] == 18


@pytest.mark.parametrize("devices", [1, 2])
def test_a_lost_run_stops_with_its_samples_named(
    small_recipe: Path, tmp_path: Path, devices: int
) -> None:
    """Exit status 1, one line, all ranks; the last checkpoint is of finite weights."""
    folder = tmp_path / "run"
    done = run(
        "train.py", "--config", small_recipe, "--run", folder, "--devices", devices,
        "--batch_size", 8 // devices, "--lr", "1e18", "schedule.name=piecewise",
        "schedule.points=[[0, 0], [0.6, 0], [0.61, 1]]", "trainer.checkpoint_every_n_steps=1",
    )  # fmt: skip
    assert done.returncode == 1
    line = one_line(done.stderr)
    report = json.loads((folder / "diverged.json").read_text())
    assert f"in epoch {report['epoch']}, step {report['step']};" in line
    traces = [
        [
            json.loads(text)
            for text in (folder / f"samples-rank{rank}.jsonl").read_text().split("\n")
            if text
        ]
        for rank in range(devices)
    ]
    for bad in report["ranks"]:
        (trained,) = [one for one in traces[bad["rank"]] if one["step"] == report["step"]]
        assert bad["keys"] == trained["keys"]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] <= report["step"]


def test_an_accuracy_outside_the_recipes_band_is_a_warning(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a whole run; a shortened one has no accuracy to compare."""
    common = ["--config", str(small_recipe), "--epochs", "1", "expected.accuracy_min=1.0"]
    assert train_program.main([*common, "--run", str(tmp_path / "a")]) == 0
    assert "is below what the recipe gave others" in one_line(capsys.readouterr().err)
    short = [*common, "--run", str(tmp_path / "b"), "trainer.limit_train_batches=0.5"]
    assert train_program.main(short) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "1 epoch of 6 steps, shortened by trainer.limit_train_batches=0.5, gl" in shown.out
