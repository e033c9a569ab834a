#!/usr/bin/env python3
"""The contenders of bench_s3.py, each in a process of its own, in the interpreter that has it.

Run by that script, to pack a contender's format, or to iterate an epoch for each line that is read.
"""
# mypy: disable-error-code="import-not-found,import-untyped"
# ruff: noqa: PLC0415 (each contender is imported in the interpreter that has it)

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[1]))  # where scripts.bench_peers is found

from scripts.bench_peers import (
    PREFETCH,
    SIZE,
    Epochs,
    decode_and_transform,
    litdata_sample,
    photos,
    through,
    transform,
    warm_up_batches,
)
from scripts.bench_process import Runner, command
from scripts.bench_s3_server import environment, wait_for_server
from tests.fault_proxy import BUCKET

if TYPE_CHECKING:
    from loaders.stats import Counters

LANES = 4
WINDOW = 64
CURL = "curl -s --retry 5 --retry-all-errors"  # moto closes a connection now and then


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the process of a contender is told."""

    contender: str
    endpoint: str
    prefix: str
    """Of the objects, below which each format has its own; without the bucket."""
    folder: str
    """Its own, empty."""
    workers: int
    batch: int
    """Samples of a global batch."""
    rank: int = 0
    world: int = 1

    @property
    def url(self) -> str:
        """Where all formats are."""
        return f"s3://{BUCKET}/{self.prefix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What a contender's process measured."""

    images: int
    """After the first batches, and so are `seconds` and `counters`."""
    seconds: float
    all_images: int
    all_seconds: float
    first_seconds: float
    """Until the first batch."""
    counters: dict[str, float]

    @property
    def rate(self) -> float:
        """Images a second after the first batches."""
        return self.images / self.seconds

    @property
    def all_rate(self) -> float:
        """The same from the first request on."""
        return self.all_images / self.all_seconds


Opened = tuple[Epochs, "Callable[[], Counters] | None"]


def open_ours(task: Task, *, cached: bool) -> Opened:
    """StreamingLoader, with a cache of unlimited size or none."""
    from loaders.augment import AugmentConfig
    from loaders.loader import StreamingLoader
    from loaders.order import OrderConfig
    from loaders.prefetch import CacheConfig
    from loaders.reader import ShardReader
    from loaders.topology import Topology
    from sharding.dataset import PackedSplit

    split = PackedSplit.open(f"{task.url}/shards")
    split.check_present()
    loader = StreamingLoader(
        ShardReader(split),
        order=OrderConfig(lanes=LANES, window=WINDOW),
        augment=AugmentConfig(),
        topology=Topology(global_batch=task.batch, rank=task.rank, world=task.world),
        size=SIZE,
        workers=task.workers,
        prefetch=PREFETCH,
        cache=CacheConfig(folder=Path(task.folder), limit=10**12) if cached else None,
    )
    wait_for_server()

    def epochs(epoch: int) -> Iterator[Any]:
        loader.set_epoch(epoch)
        return (made.images for made in loader)

    return epochs, loader.counters


def open_webdataset(task: Task) -> Opened:
    """Its own reader over our shards, through its own pipe: opener."""
    import webdataset as wds

    names = json.loads((Path(task.folder).parent / "tars.json").read_text())
    place = f"{task.endpoint}/{BUCKET}/{task.prefix}/shards"
    dataset = (
        wds.WebDataset([f"pipe:{CURL} {place}/{name}" for name in names], shardshuffle=len(names))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpeg;jpg", "cls")
        .map_tuple(transform(), int)
        .batched(task.batch, partial=False)
    )
    return through(wds.WebLoader, dataset, task.workers, batch_size=None), None


def pack_mosaic(work: Path, out: Path, size: int) -> None:
    """MDS, images as they are, in shards of `size` bytes."""
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit=size) as writer:
        for path, label in photos(work):
            writer.write({"image": Path(path).read_bytes(), "label": label})


def open_mosaic(task: Task) -> Opened:
    """MosaicML Streaming; it finds the server by S3_ENDPOINT_URL."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    prepare = decode_and_transform()

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> tuple[Any, int]:
            sample = super().__getitem__(at)
            return prepare(sample["image"]), sample["label"]

    dataset = Photos(
        remote=f"{task.url}/mosaic", local=task.folder, shuffle=True, batch_size=task.batch
    )
    return through(DataLoader, dataset, task.workers, batch_size=task.batch, drop_last=True), None


def pack_litdata(work: Path, out: Path, size: int) -> None:
    """LitData's chunks of `size` bytes, images as they are."""
    from litdata import optimize

    optimize(litdata_sample, photos(work), str(out), chunk_bytes=size, num_workers=1)


def open_litdata(task: Task) -> Opened:
    """LitData; it is told the server as a storage option."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # Its client refuses http://, which no option of its own lets it take.
    getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = True
    prepare = decode_and_transform()

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return prepare(sample["image"]), sample["label"]

    dataset = Photos(
        f"{task.url}/litdata",
        cache_dir=task.folder,
        storage_options={"endpoint_url": task.endpoint},
        shuffle=True,
        drop_last=True,
    )
    return through(
        StreamingDataLoader, dataset, task.workers, batch_size=task.batch, drop_last=True
    ), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A loader, and where it runs."""

    title: str
    open: Callable[[Task], Opened]
    venv: str = ""
    """Its interpreter: .bench/<venv>, or the current one if this is empty."""
    package: str = ""
    pack: Callable[[Path, Path, int], None] | None = None
    """Makes its format, if that is not our shards: (work, what to make, bytes of a shard)."""
    cached: bool = True
    """Whether its second epoch is to be told from its first."""


CONTENDERS = {
    "ours": Contender(title="shardstream", open=partial(open_ours, cached=True)),
    "ours-direct": Contender(
        title="shardstream without a cache", open=partial(open_ours, cached=False), cached=False
    ),
    "webdataset": Contender(
        title="webdataset, pipe:curl",
        open=open_webdataset,
        package="webdataset",
        cached=False,
    ),
    "mosaic": Contender(
        title="MosaicML Streaming",
        open=open_mosaic,
        venv="mosaic",
        package="mosaicml-streaming",
        pack=pack_mosaic,
    ),
    "litdata": Contender(
        title="LitData", open=open_litdata, venv="litdata", package="litdata", pack=pack_litdata
    ),
}
PEERS = [name for name in CONTENDERS if not name.startswith("ours")]


def iterate(
    batches: Iterable[Any], counters: "Callable[[], Counters] | None", *, skip: int
) -> Epoch:
    """Time an epoch whose first `skip` batches are not counted."""
    begin = time.perf_counter()
    total = before = 0
    first = start = stop = math.nan
    then = None
    for number, images in enumerate(batches, 1):
        assert tuple(images.shape[1:]) == (SIZE, SIZE, 3), images.shape
        total += len(images)
        stop = time.perf_counter()
        if number == 1:
            first = stop
        if number == skip:
            before, start = total, stop
            then = counters and counters()
    did = counters().minus(then)._asdict() if counters and then else {}
    return Epoch(
        images=total - before,
        seconds=stop - start,
        all_images=total,
        all_seconds=stop - begin,
        first_seconds=first - begin,
        counters=did,
    )


def serve(task: Task) -> None:
    """Iterate one epoch for each number read; print what was measured as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import PIL
    import torch

    torch.set_num_threads(1)
    contender = CONTENDERS[task.contender]
    epochs, counters = contender.open(task)
    known = {"torch": version("torch"), "pillow": PIL.__version__}
    if contender.package:
        known[contender.package] = version(contender.package)
    print(json.dumps(known), file=answers, flush=True)
    skip = warm_up_batches(task.workers)
    for line in sys.stdin:
        made = iterate(epochs(int(line)), counters, skip=skip)
        print(json.dumps(asdict(made)), file=answers, flush=True)


def start(task: Task) -> Runner:
    """The process that a contender runs in. Raises MissingError if it does not start."""
    folder = Path(task.folder)
    folder.mkdir()
    venv = CONTENDERS[task.contender].venv
    return Runner(
        command("bench_s3_peers", venv, "serve", json.dumps(asdict(task)), required=True),
        folder=folder,
        log=folder.with_suffix(".log"),
        environ=environment(task.endpoint),
    )


def main() -> None:
    """Serve TASK, or pack CONTENDER WORK SHARD_BYTES."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    what, name, *more = sys.argv[1:]
    if what == "serve":
        serve(Task(**json.loads(name)))
        return
    pack = CONTENDERS[name].pack
    assert pack is not None
    pack(Path(more[0]), Path(more[0]) / name, int(more[1]))


if __name__ == "__main__":
    main()
