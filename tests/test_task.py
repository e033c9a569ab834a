"""One shard: what is kept, what is made again, which images are rejected."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sharding.errors import BadImageError, DataError
from sharding.manifest import ImageRules, Packing
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore
from sharding.tarscan import scan as scan_tar
from sharding.task import ShardTask, find_shard, make_shard
from tests.make_images import image, image_folder, write_files

BAD = {
    "a/bomb.jpg": image(1, size=(60, 60)),
    "a/cut.jpg": image(2, size=(30, 30))[:-200],
    "a/empty.jpg": b"",
    "a/text.jpg": b"hello",
}
REASONS = {
    "a/bomb.jpg": "has 60 x 60 pixels; the limit is 1000",
    "a/cut.jpg": "cannot be decoded: image file is truncated",
    "a/empty.jpg": "is empty",
    "a/text.jpg": "is no JPEG, PNG or WebP image",
}
SKIP = ImageRules(on_bad="skip", check="decode", max_pixels=1000)


def make_task(source: Path, store: Path, rules: ImageRules = SKIP) -> ShardTask:
    """The one shard of all images below `source`."""
    job = Job(
        listing=scan(source), store=LocalStore(store), split="train", packing=Packing(), rules=rules
    )
    (task,) = job.tasks
    return task


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four good and four bad images."""
    return image_folder(write_files(tmp_path / "in", BAD), {"a": 2, "b": 2})


def test_bad_images_are_skipped_and_listed(source: Path, tmp_path: Path) -> None:
    """What cannot be used is not in the shard but among the rejects, with its reason."""
    made = make_shard(make_task(source, tmp_path / "out"))
    assert dict(made.rejects).keys() == BAD.keys()
    for path, reason in made.rejects:
        assert reason.startswith(REASONS[path])
        assert str(tmp_path) not in reason
    assert (made.shard.samples, dict(made.kinds)) == (4, {"JPEG": 4})


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_errors_without_skip(tmp_path: Path, name: str) -> None:
    """By default the first bad image ends the packing, with what can be done about it."""
    source = image_folder(write_files(tmp_path / "in", {name: BAD[name]}), {"a": 1})
    task = make_task(source, tmp_path / "out", replace(SKIP, on_bad="fail"))
    with pytest.raises(BadImageError, match=f"/{name} .*--on_bad skip$"):
        make_shard(task)
    assert not list((tmp_path / "out").glob("*"))


def test_a_shard_of_bad_images_alone(tmp_path: Path) -> None:
    """There is no shard without samples; the error says what is wrong."""
    task = make_task(write_files(tmp_path / "in", BAD), tmp_path / "out")
    with pytest.raises(DataError, match=r"^all 4 images of shard 0 are bad, the first is a/"):
        make_shard(task)
    assert not list((tmp_path / "out").glob("*"))


def test_a_shard_with_rejects_is_kept(source: Path, tmp_path: Path) -> None:
    """A restart finds the shard right, and its rejects again, without the good images' files."""
    task = make_task(source, tmp_path / "out")
    made = make_shard(task)
    for path in source.rglob("*"):
        if path.is_file() and f"a/{path.name}" not in BAD:
            path.write_bytes(b"")  # would fail if it were read
    assert find_shard(task) == (0, made)


@pytest.mark.parametrize("name", BAD)
def test_a_repaired_image_makes_the_shard_anew(source: Path, tmp_path: Path, name: str) -> None:
    """A shard that lacks an image is right only as long as that image is bad."""
    make_shard(make_task(source, tmp_path / "out"))
    write_files(source, {name: image(50)})
    task = make_task(source, tmp_path / "out")
    assert find_shard(task) == (0, None)
    made = make_shard(task)
    assert made.shard.samples == 5
    assert find_shard(task) == (0, made)


IMAGES = {
    "a/colour.JPEG": image(0, size=(40, 30)),
    "a/grey.jpg": image(1, mode="L", size=(40, 30)),
    "a/cmyk.jpg": image(2, mode="CMYK", size=(40, 30)),
    "a/n02105855_2933.JPEG": image(3, "PNG", size=(40, 30)),
    "a/x.webp": image(4, "WEBP", size=(40, 30)),
    "a/small.png": image(5, "PNG", size=(10, 15)),
}


@pytest.mark.parametrize(
    ("rules", "kinds", "made_anew", "renamed"),
    [
        ({}, "JPEG 1, JPEG CMYK 1, JPEG grey 1, PNG 2, WEBP 1", "", ""),
        ({"check": "none"}, "unchecked 6", "", ""),
        ({"transcode": True}, "JPEG 5, JPEG grey 1", "cmyk n02105855_2933 small x", "small x"),
        ({"resize": 20}, "JPEG 4, JPEG grey 1, PNG 1", "cmyk colour grey n02105855_2933 x", "x"),
    ],
)
def test_bytes_and_names_stay_unless_a_rule_changes_them(
    tmp_path: Path, rules: dict[str, Any], kinds: str, made_anew: str, renamed: str
) -> None:
    """What is made anew is a JPEG, and so is its name's ending; each is counted as what it is."""
    store = LocalStore(tmp_path / "out")
    job = Job(
        listing=scan(write_files(tmp_path / "in", IMAGES)),
        store=store,
        split="train",
        rules=ImageRules(**rules),
    )
    manifest = pack(job, workers=1)
    assert ", ".join(f"{kind} {count}" for kind, count in manifest.source.kinds.items()) == kinds
    blob = store.open("train-000000.tar")
    stored = {
        m.name: blob.read_at(m.offset, m.size) for m in scan_tar(blob, "") if m.name[-3:] != "cls"
    }
    expected = {
        path.rpartition(".")[0] + ".jpg" if Path(path).stem in renamed.split() else path: data
        for path, data in IMAGES.items()
    }
    assert stored.keys() == expected.keys()
    changed = {Path(name).stem for name, data in stored.items() if data != expected[name]}
    assert changed == set(made_anew.split())
    assert find_shard(job.tasks[0])[1] is not None
