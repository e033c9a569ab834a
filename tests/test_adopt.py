"""Adopting tars that others made: each sample is found as it stands, anything doubtful refused."""

import io
import json
import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
import xxhash
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.order import Order, OrderConfig
from loaders.reader import ShardReader
from sharding.adopt import (
    AdoptTask,
    Labels,
    _count,
    adopt,
    adopt_shard,
    expand,
    mixing,
    sorted_warning,
)
from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
from sharding.manifest import Manifest
from sharding.store import LocalStore
from sharding.verify import check_shard
from tests.make_images import files_below, image, image_folder, pack_folder

Sample = dict[str, Any]
JPG, PNG = image(1), image(2, "PNG")


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> str:
    """A tar of these files, in this order, as Python's tarfile writes it."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_samples(path: Path, samples: list[Sample]) -> str:
    """A tar of samples as webdataset's TarWriter writes it."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with wds.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Fail if a block allocates more bytes than this at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def index_tars(urls: list[str], destination: Path, **options: Any) -> Manifest:
    """Adopt with one worker."""
    defaults = {"split": "train", "classes": None, "label_key": "label", "workers": 1}
    return adopt(urls, LocalStore(destination), **(defaults | options))


def rows_of(split: PackedSplit) -> list[tuple[str, bytes, int, int, int]]:
    """Key, bytes, label, width and height of every sample, as the loader reads them."""
    reader = ShardReader(split)
    numbers = np.arange(split.manifest.samples)
    facts = zip(*(column.tolist() for column in reader.facts(numbers)), strict=True)
    return [(reader.key(i), reader.read(i), *fact) for i, fact in enumerate(facts)]


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


GOOD = [("a/1.jpg", JPG), ("a/1.cls", b"3"), ("a/2.png", PNG), ("a/2.cls", b"1")]
BAD = {
    "out of group": ([*GOOD, ("a/1.txt", b"")], "'a/1.txt' at offset .*stands apart.*'a/1'"),
    "two images": ([*GOOD, ("b.jpg", JPG), ("b.png", PNG)], "'b.png'.*second"),
    "same image": ([("b.jpg", JPG), ("b.JPG", JPG), ("b.cls", b"1")], "'b.JPG'.*second image"),
    "two labels": ([("b.cls", b"1"), ("b.CLS", b"1"), ("b.jpg", JPG)], "second image or label"),
    "labels differ": (
        [("b.jpg", JPG), ("b.cls", b"1"), ("b.json", b'{"label": 2}')],
        "'b' has the label {1, 2}",
    ),
    "no label": ([*GOOD, ("b.jpg", JPG)], "'b' has no label"),
    "no label in JSON": ([("b.jpg", JPG), ("b.json", b'{"lable": 2}')], "'b' has no label"),
    "no image": ([*GOOD, ("b.cls", b"1")], "'b' has a label, but no image"),
    "no jpeg": ([("b.jpg", b"GIF89a"), ("b.cls", b"1")], "'b.jpg' at offset 512 is no JPEG"),
    "empty image": ([("b.jpg", b""), ("b.cls", b"1")], "'b.jpg' at offset 512 is no JPEG"),
    "no samples": ([("README", b"x"), ("b.txt", b"")], "holds no samples, only 2 other files"),
    "empty": ([], "holds no samples"),
    "long label": ([("b.jpg", JPG), ("b.cls", b"1".zfill(33))], "'b.cls'.* has 33 bytes"),
    "large JSON": ([("b.json", b" " * ((1 << 20) + 1))], "'b.json'.* has 1048577 bytes"),
    "deep JSON": ([("b.json", b"[" * 100_000)], "'b.json'.* is no JSON"),
    "long number": ([("b.json", b'{"label": %b}' % (b"9" * 5000))], "'b.json'.* is no JSON"),
    "JSON list": ([("b.json", b"[1]")], "'b.json'.* is no JSON object"),
}
for _label in (b"", b"-1", b"+1", b"1.0", b"1_0", b"0x1", "\u0663".encode(), b"1 2", b"4", b"n01"):
    BAD[f"cls {_label!r}"] = ([("b.jpg", JPG), ("b.cls", _label)], "'b.cls'.* gives the label")
for _value in ("true", "-1", "1.0", '"1"', "null", "[1]", "4", "1e3", "NaN"):
    BAD[f"json {_value}"] = (
        [("b.jpg", JPG), ("b.json", b'{"label": %b}' % _value.encode())],
        "'b.json'.* gives the label",
    )


@pytest.mark.parametrize(("files", "message"), BAD.values(), ids=BAD)
def test_refused(files: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    """A tar that is not plainly samples of four classes is refused; no manifest is left."""
    url = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=f"^{re.escape(url)}.*{message}"):
        index_tars([url], tmp_path, classes=tuple("abcd"))
    assert not (tmp_path / "manifest.json").exists()


def test_accepted(tmp_path: Path) -> None:
    """JSON beside an equal label, other files anywhere in a group, and what webdataset skips."""
    files = [
        ("README", b"no extension"),
        ("__meta__/info.json", b"x"),
        ("a/._1.jpg", b"hidden"),
        ("notes.txt", b"a group without a sample"),
        ("a.b/1.txt", b""),
        ("a.b/1.JPeG", PNG),  # the bytes decide
        ("README2", b""),
        ("a.b/1.cls", b" 3\n"),
        ("a.b/1.json", b'{"label": 3}'),
        ("2.webp", image(3, "WEBP")),
        ("2.json", b'{"x": {"label": 9}, "label": 0}'),
    ]
    url = write_tar(tmp_path / "x.tar", files)
    told: list[int] = []
    index_tars([url], tmp_path, progress=lambda _, passed_over: told.append(passed_over))
    rows = rows_of(PackedSplit.open(str(tmp_path)))
    assert [(key, label) for key, _, label, *_ in rows] == [("a.b/1", 3), ("2", 0)]
    assert told == [6]
    assert index_tars([url], tmp_path / "y", classes=tuple("abcd")).classes == tuple("abcd")


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


def test_patterns() -> None:
    """Braces are expanded as a shell does it."""
    assert expand("x.tar") == ["x.tar"]
    assert expand("s3://b/x-{08..10}.tar") == [f"s3://b/x-{i}.tar" for i in ("08", "09", "10")]
    assert expand("{a,b{1..2}}.tar") == ["a.tar", "b1.tar", "b2.tar"]
    assert _count("{0..999999}") == _count("{0..9}" * 6) == 1_000_000  # the most
    with pytest.raises(UsageError, match="a comes 2 times"):
        expand("{a,b,a}")
    for pattern in ("{a,b", "a}b", "{" * 4000):
        with pytest.raises(UsageError, match="braces that do not match"):
            expand(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999}",
        "{0..999}{0..999}{0..1}",
        "{a,{0..1000000}}",
        "{0..1000000000..7}",
        "{0..99999999999999999999}",
        "{-5..999999999}",
        "{1..2..0}{1000000..0}",
        "{a,b}" * 20,
        f"{{0..{'9' * 5000}}}",
    ],
)
def test_too_many(pattern: str) -> None:
    """What stands for more than a million is refused before it is expanded."""
    with peak_below(100_000), pytest.raises(UsageError, match="more than 1000000 tars"):
        expand(pattern)


pieces = st.recursive(
    st.sampled_from(["", "a", "b", "\\{", "{1..5..2}", "{03..1}", "{x}", "{a..c}", "{}", ","]),
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda items: "{" + ",".join(items) + "}")
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(pieces)
def test_counted_rightly(pattern: str) -> None:
    """The count is what braceexpand makes, but for ranges of letters, which are few."""
    made = len(list(braceexpand(pattern)))
    assert made == _count(pattern) * 3 ** pattern.count("{a..c}") or "{a..c}" in pattern


def shards(labels: Labels, samples: int) -> list[Labels]:
    """Cut labels into shards."""
    return np.split(labels, range(samples, len(labels), samples))


def classes(count: int, samples: int) -> tuple[Labels, Labels]:
    """Labels of so many samples a class, sorted and mixed."""
    labels = np.repeat(np.arange(count, dtype=np.uint32), samples)
    return labels, np.random.default_rng(0).permutation(labels)


def test_sorted_classes() -> None:
    """Sorted classes, and a class a shard, are warned of with numbers; mixed ones are not."""
    labels, mixed = classes(200, 50)
    for samples in (50, 100, 130):
        text = sorted_warning(shards(labels, samples), lanes=4, window=100)
        assert text is not None
        found = re.search(r"the (\d+) samples .* of (\d+) classes, .* has (\d+)", text)
        assert found
        mixed_at_once, seen, full = map(int, found.groups())
        assert (mixed_at_once, full) == (400, 174)  # 200 (1 - 0.96^50)
        assert 12 <= seen <= 40  # 3 to 10 classes in each of 4 windows
        assert "unpack" in text
        assert sorted_warning(shards(mixed, samples), lanes=4, window=100) is None
    assert sorted_warning(shards(labels, 50), lanes=4, window=5000) is None  # all is mixed
    assert sorted_warning(shards(labels, 10_000), lanes=4, window=100) is None  # in one shard
    assert sorted_warning(shards(labels[:1], 1), lanes=4, window=100) is None


def test_mixing_of_imagenet() -> None:
    """ImageNet sorted by class: 32 lanes see some of the 1,000 classes at a time."""
    labels, mixed = classes(1000, 1281)
    found = mixing(shards(labels, 1200), lanes=32, window=1024)
    assert found.samples == 32 * 1024
    assert 130 <= found.seen <= 170
    assert found.full == pytest.approx(1000)
    found = mixing(shards(mixed, 1200), lanes=32, window=1024)
    assert found.seen == pytest.approx(found.full, rel=1e-3)


def test_mixing_is_that_of_the_loader() -> None:
    """The loader's own order brings about as many classes in a step as is computed."""
    labels, _ = classes(200, 50)
    found = mixing(shards(labels, 50), lanes=4, window=100)
    order = Order([50] * 200, OrderConfig(lanes=4, window=100))
    seen = []
    for step in range(0, order.steps(400), 5):
        numbers = order.part(epoch=0, step=step, batch=400, rank=0, world=1)
        seen.append(len(np.unique(labels[numbers])))
    assert found.seen == pytest.approx(np.mean(seen), rel=0.1)
