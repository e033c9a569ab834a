"""shard.py: what each command prints, and that bad input gives one line and its exit status."""

import fcntl
import itertools
import json
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from loaders.order import Order, OrderConfig
from sharding.dataset import open_splits
from sharding.manifest import MANIFEST_NAME
from tests.conftest import Call
from tests.make_images import (
    ENVIRONMENT,
    SHARD_PY,
    files_below,
    image,
    image_folder,
    run_shard,
    write_files,
)

STEP = ("--epoch", "2", "--step", "1", "--global_batch", "6")


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> Path:
    """In the working folder `in` with train/ and val/, and `out`, packed of it; returns `out`."""
    monkeypatch.chdir(tmp_path)
    image_folder(Path("in/train"), {"a": 9, "b": 8, "c": 7})
    image_folder(Path("in/val"), {"a": 2, "c": 3}, first=50)
    assert call("pack in out --max_samples 5 --workers 1")[0] == 0
    return Path("out")


@pytest.mark.usefixtures("packed")
def test_pack(call: Call) -> None:
    """Packing prints a line a split that says where every file went; no bar without a terminal."""
    write_files(Path("in/train"), {"a/notes.txt": b"1"})
    status, out, err = call("pack in new --max_samples 5 --workers 1")
    assert (status, err) == (0, "")
    assert re.fullmatch(
        r"train: 24 images found = 24 packed \+ 0 rejected \(1 other file ignored\), 3 classes, "
        r"5 shards, 0\.\d MB in new/train \(24 JPEG\)\n"
        r"val: 5 images found = 5 packed \+ 0 rejected \(0 other files ignored\), 3 classes, "
        r"1 shard, 0\.\d MB in new/val \(5 JPEG\)\n",
        out,
    )


@pytest.mark.usefixtures("packed")
def test_progress() -> None:
    """On a terminal a bar shows images, images/s and MB/s."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    with subprocess.Popen(
        [*SHARD_PY, "pack", "in", "new"], stdout=-3, stderr=terminal, env=ENVIRONMENT
    ):
        os.close(terminal)
        shown = b""
        try:
            while more := os.read(screen, 1 << 16):
                shown += more
        except OSError:  # the program ended
            os.close(screen)
    assert re.search(rb"pack train: 100%.* 24/24 .*images/s.*MB/s", shown)
    assert re.search(rb"pack val: 100%.* 5/5 ", shown)


def test_labels_of_the_validation_split(packed: Path, call: Call) -> None:
    """A validation split has the training split's classes, packed with it or alone beside it."""
    train, val = open_splits("out").values()
    assert train.manifest.classes == val.manifest.classes == ("a", "b", "c")
    assert set(val.read_index(0).table["label"].tolist()) == {0, 2}
    write_files(Path("alone/train"), files_below(packed / "train"))
    assert call("pack in/val alone --max_samples 5 --workers 1")[0] == 0
    assert files_below(Path("alone")) == files_below(packed)


@pytest.mark.usefixtures("packed")
def test_info(call: Call) -> None:
    """`info` prints a table with a column a split, `--json` the same and the classes' names."""
    status, out, _ = call("info out --json")
    facts = json.loads(out)
    assert (status, [fact["class_names"] for fact in facts]) == (0, [["a", "b", "c"]] * 2)
    assert [fact["class_samples"] for fact in facts] == [[9, 8, 7], [2, 0, 3]]
    status, out, _ = call("info out")
    table = {line[:15].strip(): line[15:].split() for line in out.splitlines()}
    manifests = [split.manifest for split in open_splits("out").values()]
    said = {
        "split": ["train", "val"],
        "url": ["out/train", "out/val"],
        "digest": [manifest.digest for manifest in manifests],
        "samples": [24, 5],
        "classes": [3, 3],
        "shards": [5, 1],
    }
    for name, values in said.items():
        assert [fact[name] for fact in facts] == values
        assert table[name] == [str(value) for value in values]
    assert "train: images by shorter side in pixels\n  9 " in out
    assert "val: classes by number of images\n" in out
    assert call("info out --all")[1] == out  # of few shards all are read anyway


@pytest.mark.parametrize(("world", "seed"), [(1, 0), (3, 0), (6, 5)])
def test_locate(packed: Path, call: Call, world: int, seed: int) -> None:
    """`locate` names what the order gives each rank; there the tar holds the image of this key."""
    line = f"locate out --world {world} --seed {seed} --lanes 4 --window 3"
    rows = json.loads(call(line, *STEP, "--json")[1])
    split = open_splits("out")["train"]
    counts = [part.samples for part in split.manifest.shards]
    order = Order(counts, OrderConfig(seed=seed, lanes=4, window=3))
    numbers = order.part(epoch=2, step=1, batch=6, rank=0, world=1).tolist()
    for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        place, line_of_index = order.place(number)
        assert (row["rank"], row["shard"]) == (i * world // 6, split.manifest.shards[place].url)
        data = (packed / "train" / row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert data == Path("in/train", f"{row['key']}.JPEG").read_bytes()
        assert (
            xxhash.xxh3_64_intdigest(data) == split.read_index(place).table["xxh3"][line_of_index]
        )
    status, out, _ = call(line, *STEP)
    assumed, title, *shown = out.splitlines()
    assert assumed == f"seed {seed}, 4 lanes, window 3"
    assert (status, title) == (
        0, f"epoch 2, step 1 of 4: {6 // world} samples a rank, the first of each:"
    )  # fmt: skip
    assert [
        re.split(r" +", text.replace(" bytes", "").replace(" offset", "")) for text in shown
    ] == [
        ["rank", *(str(row[name]) for name in ("rank", "shard", "offset", "size", "key"))]
        for row in rows[:: 6 // world]
    ]


def test_locate_takes_the_order_of_a_recipe(packed: Path, call: Call) -> None:
    """What is typed counts more; without either it says what it assumes."""
    (packed / "own.yaml").write_text("seed: 5\ndata: {lanes: 4, window: 3}")
    asked = call("locate out --seed 5 --lanes 4 --window 3", *STEP)
    assert call(f"locate out --recipe {packed}/own.yaml", *STEP) == asked
    more = call(f"locate out --recipe {packed}/own.yaml --lanes 7", *STEP)[1]
    assert more.startswith("seed 5, 7 lanes, window 3\n")
    default = OrderConfig()
    found = call("locate out", *STEP)[1]
    assert found.startswith(f"seed 0, {default.lanes} lanes, window {default.window}\n")


def edit(**changes: object) -> None:
    """Change values in the manifest of out/train."""
    path = Path("out/train", MANIFEST_NAME)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("line", ["info out", "verify out", "locate out"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda: edit(format_version=2),
            "version 2 and order version 1; this program reads 1 and 1",
        ),
        (lambda: edit(classes=["c", "b", "a"]), "was changed or damaged"),
        (lambda: edit(shards="many"), "is no manifest of shardstream"),
        (
            lambda: Path("out/train", MANIFEST_NAME).write_bytes(b"\0"),
            "is no manifest of shardstream",
        ),
    ],
    ids=itertools.count(),
)
def test_bad_manifest(call: Call, line: str, damage: Callable[[], None], message: str) -> None:
    """Every command refuses a bad manifest with one line and status 3."""
    damage()
    status, out, err = call(line, *(STEP if line.startswith("locate") else []))
    assert (status, out, err.count("\n")) == (3, "", 1)
    assert f"error: out/train/{MANIFEST_NAME} " in err
    assert message in err


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(
    ("line", "files", "status", "message"),
    [
        ("pack nothing new", {}, 2, "nothing is no folder"),
        ("pack in/train/a/a_0.JPEG new", {}, 2, "a_0.JPEG is no folder"),
        ("pack in/train/a new", {}, 2, "in/train/a has no class folders"),
        ("pack in new", {"in/train/d/x.txt": b""}, 3, "class folder in/train/d has no image"),
        ("pack in new", {"in/val/d/x.jpg": image(0)}, 2, "in/val has the class 'd'"),
        ("pack in new", {"in/train/a/x.jpg": b"text"}, 3, "in/train/a/x.jpg is no JPEG"),
        ("pack in new", {"in/train/a/x.jpg": b""}, 3, "in/train/a/x.jpg is empty"),
        ("pack in new", {"in/train/a/a_0.png": b"1"}, 3, "share the key 'a/a_0'"),
        ("pack in new", {"new/train/x.tar": b"1"}, 2, "not packed here"),
        ("pack in out", {}, 2, "holds a finished data set"),
        ("pack in gs://bucket/prefix", {}, 2, "cannot open"),
        (f"pack in new --seed {1 << 64}", {}, 2, "seed must be in"),
        ("pack in new --shard_size 0", {}, 2, "at least 1 byte"),
        ("info nothing", {}, 3, "or in its val/: there is no such folder"),
        ("verify in", {}, 3, "val/: it holds images: pack them"),
        ("pack out new", {}, 2, "out/train has no class folders, it is packed"),
        ("verify pipe://cat", {}, 2, "cannot open 'pipe://cat"),
        ("unpack out out/train/in", {}, 2, "out/train/in is or lies in out, which is read; choose"),
        ("copy out ./out/", {}, 2, "./out is or lies in out, which is read; choose another place"),
        ("copy file://out file://out/", {}, 2, "is or lies in file://out, which is read"),
        ("copy out file://out/x", {}, 2, "file://out/x is or lies in out, which is read; choose"),
        ("copy out/train out", {}, 2, "out/train is or lies in out/train, which is read; choose"),
        ("pack in file://in", {}, 2, "file://in/train is or lies in in/train, which is read"),
        ("copy s3://b/x s3://b/x/y", {}, 2, "s3://b/x/y is or lies in s3://b/x, which is read"),
        *(
            (f"{command} file", {"file": b""}, 2, "a file stands where a folder is needed; choose")
            for command in ("pack in", "unpack out", "copy out", "index out/train/train-000000.tar")
        ),
        ("preview out sheet.png --samples 101", {}, 2, "--samples must be at most 100, got 101"),
        ("pack in in", {}, 2, "in/train is or lies in in/train, which is read; choose"),
        ("pack in in/train/out", {}, 2, "in/train/out/train is or lies in in/train, which"),
        ("locate out --epoch 0 --step 4 --global_batch 6", {}, 2, "has 4 steps, 0 to 3"),
        (
            "locate out --epoch 0 --step 0 --global_batch 6 --world 4",
            {},
            2,
            "a global batch of 6 is not divisible by 4 ranks",
        ),
    ],
    ids=itertools.count(),
)
def test_bad_input(
    call: Call, line: str, files: dict[str, bytes], *, status: int, message: str
) -> None:
    """Bad input gives one line that names it, and status 2 for wrong use or 3 for bad data."""
    write_files(Path(), files)
    found, _, err = call(line, *(["--workers", "1"] if line.startswith("pack") else []))
    assert (found, err.count("\n")) == (status, 1)
    assert message in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "locate /data/imagenet-shards"),
        ("unpick out", "invalid choice: 'unpick'"),
        ("pack in", "required: DST"),
        ("pack in new --shard_size 12parsecs", "'12parsecs' is no size"),
        ("pack in new --shard_size 300", "300MB or, if bytes are meant, 300B"),
        ("preview out sheet.jpg", "'sheet.jpg' is no name of a PNG"),
        ("pack in new --workers 0", "'0' is no positive integer"),
        ("pack in new --max_samples 1.5", "'1.5' is no positive integer"),
        ("pack in new --seed=-1", "'-1' is no integer of at least 0"),
        ("pack in new --compress", "unrecognized arguments: --compress"),
        ("locate out --step 0 --global_batch 6", "required: --epoch"),
        (f"locate out --lanes {'9' * 5000}", "argument --lanes: invalid"),
    ],
    ids=itertools.count(),
)
def test_wrong_usage(call: Call, line: str, message: str) -> None:
    """A command line that cannot be read gives the usage, an error and status 2; none: help."""
    status, out, err = call(line)
    assert (status, out, err[:7]) == (2, "", "usage: ")
    assert message in err.splitlines()[-1]


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(
    ("line", "status"), [("info out", 0), ("info out --xml", 2), ("pack no new", 2), ("info no", 3)]
)
def test_exit_status(line: str, status: int) -> None:
    """The program itself ends with the status, and with no traceback."""
    run = run_shard(*line.split())
    assert (run.returncode, bool(run.stderr)) == (status, status != 0)
    assert "Traceback" not in run.stderr
