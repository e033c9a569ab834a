"""Adopting tars that others made: their samples are read as our own, and the tars stay."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
import xxhash

from sharding.adopt import AdoptTask, adopt_shard
from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
from sharding.store import LocalStore
from sharding.urls import expand
from sharding.verify import check_shard
from tests.make_images import files_below, image, image_folder, pack_folder
from tests.make_tars import GOOD, JPG, PNG, index_tars, rows_of, write_tar
from tests.memory import peak_below

Sample = dict[str, Any]


def write_samples(path: Path, samples: list[Sample]) -> str:
    """A tar of samples as webdataset's TarWriter writes it."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with wds.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def test_webdataset_shards(tmp_path: Path) -> None:
    """Every sample of webdataset's shards is read by the loader with its bytes, label and size."""
    expected = []
    for shard in range(3):
        samples: list[Sample] = []
        for i in range(shard + 2):
            size = (10 + i, 20 + shard)
            kind = ("jpg", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")
            extension, encoder = kind[i % 4]
            data = image(10 * shard + i, encoder, size=size)
            label = {"cls": b"%d\n" % i} if i % 2 else {"json": json.dumps({"label": i}).encode()}
            others = {"txt": b"a text", "seg.png": PNG}
            samples.append({"__key__": f"s{shard}/{i:04}", extension: data, **label, **others})
            expected.append((f"s{shard}/{i:04}", data, i, *size))
        write_samples(tmp_path / f"tars/x-{shard}.tar", samples)
    told: list[tuple[int, int]] = []
    manifest = index_tars(
        expand(f"{tmp_path}/tars/x-{{0..2}}.tar"),
        tmp_path / "index",
        workers=2,
        progress=lambda shard, passed_over: told.append((shard.samples, passed_over)),
    )
    split = PackedSplit.open(str(tmp_path / "index"))
    assert split.manifest == manifest
    assert rows_of(split) == expected
    assert told == [(2, 4), (3, 6), (4, 8)]
    assert (manifest.classes, manifest.packing) == (("0", "1", "2", "3"), None)
    assert manifest.source.kinds == {"JPEG": 4, "PNG": 3, "WEBP": 2}
    assert [shard.url for shard in manifest.shards] == [f"{tmp_path}/tars/x-{i}.tar" for i in "012"]
    split.check_present()
    assert [check_shard(split, i) for i in range(3)] == [[], [], []]
    for one in manifest.shards:
        assert xxhash.xxh3_128_hexdigest(Path(one.url).read_bytes()) == one.xxh128


def test_our_own_shards(tmp_path: Path) -> None:
    """Tars that we packed give the same indexes, hashes and digest when they are adopted."""
    packed = pack_folder(image_folder(tmp_path / "s", {"a": 3, "b.c": 4}), tmp_path / "p", seed=2)
    before = files_below(tmp_path / "p")
    urls = [packed.where(i) for i in range(len(packed.manifest.shards))]
    manifest = index_tars(urls, tmp_path / "i", classes=packed.manifest.classes)
    assert manifest.digest == packed.manifest.digest
    (tmp_path / "p/manifest.json").unlink()
    beside = index_tars(urls, tmp_path / "p", classes=packed.manifest.classes)
    assert beside.shards == packed.manifest.shards  # with bare names
    after = files_below(tmp_path / "p")
    assert {k: v for k, v in after.items() if k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }


def test_names(tmp_path: Path) -> None:
    """A tar in DST has its bare name, however it is written; others are absolute."""
    write_tar(tmp_path / "d/a.tar", [("x.jpg", JPG), ("x.cls", b"0")])
    write_tar(tmp_path / "b.tar", [("x.jpg", PNG), ("x.cls", b"0")])
    (tmp_path / "link").symlink_to("d")
    urls = [f"file://{tmp_path}/link/../d/a.tar", f"{tmp_path}/d/../b.tar"]
    manifest = index_tars(urls, tmp_path / "link")
    assert [shard.url for shard in manifest.shards] == ["a.tar", f"{tmp_path}/b.tar"]
    shutil.move(tmp_path / "d", tmp_path / "moved")
    assert len(rows_of(PackedSplit.open(f"{tmp_path}/moved"))) == 2
    for url in ("", f"{tmp_path}/.hidden.tar"):
        with pytest.raises(UsageError, match="names no tar"):
            index_tars([url], tmp_path / "e")
    with pytest.raises(UsageError, match=r"b\.tar comes 2 times"):
        index_tars([f"{tmp_path}/b.tar", f"{tmp_path}/x/../b.tar"], tmp_path / "e")
    with pytest.raises(UsageError, match="no tars to adopt"):
        index_tars([], tmp_path / "e")
    for url in (f"{tmp_path}/gone.tar", f"{tmp_path}/b.tar/c.tar", f"{tmp_path}/moved/"):
        with pytest.raises(DataError, match=f"{url.rstrip('/')} is missing or a folder"):
            index_tars([url], tmp_path / "e")


def test_label_without_classes(tmp_path: Path) -> None:
    """A label of billions does not make billions of class names."""
    for label, data in ((1 << 20, JPG), (1 << 32, JPG), ((1 << 20) - 1, PNG)):
        write_tar(tmp_path / f"{label}.tar", [("a.jpg", data), ("a.cls", b"%d" % label)])
    for label in (1 << 20, 1 << 32):
        with pytest.raises(DataError, match=f"gives the label {label}"):
            index_tars([f"{tmp_path}/{label}.tar"], tmp_path / "x")
    assert len(index_tars([f"{tmp_path}/{(1 << 20) - 1}.tar"], tmp_path / "y").classes) == 1 << 20


def test_damaged(tmp_path: Path) -> None:
    """What the strict scan refuses is refused here, with the shard's name."""
    url = write_tar(tmp_path / "x.tar", GOOD)
    data = Path(url).read_bytes()
    for size in range(0, len(data.rstrip(b"\0")), 512):
        Path(url).write_bytes(data[:size])
        with pytest.raises(DataError, match=r"x\.tar.*(cut|empty)"):
            index_tars([url], tmp_path)


def test_again(tmp_path: Path) -> None:
    """The same command changes nothing; another one is refused and leaves all as it was."""
    one = write_tar(tmp_path / "1.tar", GOOD)
    two = write_tar(tmp_path / "2.tar", [("b.png", PNG), ("b.cls", b"1")])
    first = index_tars([one], tmp_path / "i")
    before = files_below(tmp_path / "i")
    assert index_tars([one], tmp_path / "i") == first
    for urls, options in (([two], {}), ([one, two], {}), ([one], {"classes": tuple("abcd")})):
        with pytest.raises(UsageError, match="these tars and options do not make"):
            index_tars(urls, tmp_path / "i", **options)
    assert files_below(tmp_path / "i") == before


def test_same_bytes_twice(tmp_path: Path) -> None:
    """A copy of a tar under another name would bring its samples twice."""
    urls = [write_tar(tmp_path / f"{i}.tar", GOOD) for i in (1, 2)]
    with pytest.raises(DataError, match=r"1\.tar and .*2\.tar hold the same bytes"):
        index_tars(urls, tmp_path / "i")


def test_memory(tmp_path: Path) -> None:
    """A tar of 200 MB is read in pieces; what is passed over is part of its hash too."""
    noise = np.random.default_rng(0).bytes(50_000_000)
    files = [("a.mp4", noise), ("a.jpg", JPG), ("a.cls", b"0"), ("b.mp4", noise)]
    files += [("c.mp4", noise), ("d.mp4", noise), ("e.jpg", PNG), ("e.cls", b"1")]
    url = write_tar(tmp_path / "x.tar", files)
    task = AdoptTask(
        store=LocalStore(tmp_path),
        url="x.tar",
        index_name="x.npy",
        labels=2,
        label_key="label",
        write=True,
    )
    with peak_below(20_000_000):
        adopted = adopt_shard(task)
    assert adopted.shard.xxh128 == xxhash.xxh3_128_hexdigest(Path(url).read_bytes())
    assert (adopted.shard.samples, adopted.passed_over) == (2, 4)
