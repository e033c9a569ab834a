"""The loaders that bench_loader.py compares: how each packs its data and iterates an epoch.

    python -m scripts.bench_peers pack FORMAT WORK              makes WORK/FORMAT of WORK/photos
    python -m scripts.bench_peers serve CONTENDER WORK BATCH    iterates an epoch on each line read

Each runs in an interpreter that has its packages, so nothing is imported before it is needed.
"""
# mypy: disable-error-code="import-not-found,import-untyped"
# ruff: noqa: PLC0415 (see above), DOC402 (an epoch is an iterator to its user)

import ctypes
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZE = 224
"""Pixels of a delivered image's side."""
PREFETCH = 2
"""Batches that each worker makes ahead, where a loader lets one choose."""
SHARDS = 8
"""Shards of equal length, because webdataset's workers take whole ones."""
FFCV_QUALITY = 90

Epochs = Callable[[int], Iterable[Any]]
"""Epoch number -> the images of its batches: (N, SIZE, SIZE, 3) uint8, or N if nothing is kept."""


def warm_up_batches(workers: int) -> int:
    """Batches at an epoch's beginning that may have been made while nobody asked."""
    return 2 * workers * PREFETCH + 2


def photos(work: Path) -> list[tuple[str, int]]:
    """Path and label of each photo."""
    folders = sorted((work / "photos" / "train").iterdir())
    return [(str(path), i) for i, folder in enumerate(folders) for path in sorted(folder.iterdir())]


# ----- ours


def pack_shards(source: str, work: Path, out: Path) -> None:
    """WORK/<source>, an ImageFolder, as our shards."""
    images = sum(1 for path in (work / source).rglob("*") if path.is_file())
    command = [sys.executable, "shard.py", "pack", str(work / source), str(out)]
    command += ["--max_samples", str(math.ceil(images / SHARDS))]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def open_ours(shards: str, decoder: str, work: Path, workers: int, batch: int) -> Epochs:
    """Shards on StreamingLoader."""
    from loaders.augment import AugmentConfig
    from loaders.loader import StreamingLoader
    from loaders.order import OrderConfig
    from loaders.reader import ShardReader
    from loaders.topology import Topology
    from sharding.dataset import PackedSplit

    loader = StreamingLoader(
        ShardReader(PackedSplit.open(str(work / shards / "train"))),
        order=OrderConfig(),
        augment=AugmentConfig(),
        topology=Topology(global_batch=batch),
        size=SIZE,
        workers=workers,
        prefetch=PREFETCH,
        decoder=decoder,
    )

    def epochs(epoch: int) -> Iterator[Any]:
        loader.set_epoch(epoch)
        return (made.images for made in loader)

    return epochs


class _Region(ctypes.Structure):
    """Item in bare_limit.c."""

    _fields_ = (
        ("data", ctypes.c_char_p),
        ("size", ctypes.c_ulong),
        *((name, ctypes.c_int) for name in ("left", "top", "right", "bottom", "denom")),
    )


def pack_bare(_work: Path, out: Path) -> None:
    """Compile the C loop."""
    source = ROOT / "scripts" / "bare_limit.c"
    subprocess.run(
        ["cc", "-O3", "-shared", "-fPIC", str(source), "-o", str(out), "-ljpeg"], check=True
    )


def open_bare(work: Path, workers: int, batch: int) -> Epochs:
    """The C loop over the regions that our loader decodes, in threads; it delivers nothing."""
    import numpy as np

    from loaders.augment import AugmentConfig, Draw, random_crops
    from loaders.decode import image_size

    decode = ctypes.CDLL(str(work / "bare")).bare_decode
    images = [Path(path).read_bytes() for path, _ in photos(work)]
    widths, heights = np.array([image_size(data) for data in images]).T
    numbers = np.arange(len(images))
    threads = ThreadPoolExecutor(workers)

    def run(chunk: list[_Region]) -> int:
        decode((_Region * len(chunk))(*chunk), len(chunk))
        return len(chunk)

    def epochs(epoch: int) -> Iterator[int]:
        draw = Draw(0, epoch, numbers, np.zeros_like(numbers))
        boxes = random_crops(draw, widths, heights, AugmentConfig()).boxes
        covers = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) / SIZE
        denoms = 2 ** np.clip(np.floor(np.log2(covers)), 0, 3)
        scaled = boxes / denoms[:, None]
        edges = np.hstack([np.floor(scaled[:, :2]), np.ceil(scaled[:, 2:]), denoms[:, None]])
        regions = [
            _Region(data, len(data), *row)
            for data, row in zip(images, edges.astype(int).tolist(), strict=True)
        ]
        whole = len(regions) // batch * batch
        return threads.map(run, (regions[i : i + batch] for i in range(0, whole, batch)))

    return epochs


# ----- peers that decode with Pillow, in the worker processes of a PyTorch DataLoader


def transform() -> Any:
    """PIL image -> random-resized crop, flipped or not: (SIZE, SIZE, 3) uint8 tensor."""
    import numpy as np
    import torch
    from torchvision import transforms

    def pixels(image: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(image))

    return transforms.Compose(
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), pixels]
    )


def decode_and_transform() -> Callable[[bytes], Any]:
    """The same for encoded bytes."""
    from io import BytesIO

    from PIL import Image

    augment = transform()
    return lambda data: augment(Image.open(BytesIO(data)).convert("RGB"))


def through(loader_class: Any, dataset: Any, workers: int, **options: Any) -> Epochs:
    """Epochs of (images, labels) batches from a DataLoader whose workers stay."""
    loader = loader_class(
        dataset,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
        **options,
    )
    return lambda _: (images for images, _ in loader)


def open_torchvision(work: Path, workers: int, batch: int) -> Epochs:
    """ImageFolder."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(work / "photos" / "train"), transform())
    return through(DataLoader, folder, workers, batch_size=batch, shuffle=True, drop_last=True)


def open_webdataset(work: Path, workers: int, batch: int) -> Epochs:
    """Its own reader over our shards."""
    import webdataset as wds

    shards = sorted(str(path) for path in (work / "shards" / "train").glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=SHARDS)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpeg;jpg", "cls")
        .map_tuple(transform(), int)
        .batched(batch, partial=False)
    )
    return through(wds.WebLoader, dataset, workers, batch_size=None)


def pack_mosaic(work: Path, out: Path) -> None:
    """MDS, images as they are."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
        for path, label in photos(work):
            writer.write({"image": Path(path).read_bytes(), "label": label})


def open_mosaic(work: Path, workers: int, batch: int) -> Epochs:
    """MosaicML Streaming."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    prepare = decode_and_transform()

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> tuple[Any, int]:
            sample = super().__getitem__(at)
            return prepare(sample["image"]), sample["label"]

    local = work / f"mosaic-{workers}"  # a second data set on one folder is refused
    local.symlink_to(work / "mosaic")
    dataset = Photos(local=str(local), shuffle=True, batch_size=batch)
    return through(DataLoader, dataset, workers, batch_size=batch, drop_last=True)


def litdata_sample(photo: tuple[str, int]) -> dict[str, Any]:
    """What LitData stores of a photo."""
    return {"image": Path(photo[0]).read_bytes(), "label": photo[1]}


def pack_litdata(work: Path, out: Path) -> None:
    """LitData's chunks, images as they are."""
    from litdata import optimize

    optimize(litdata_sample, photos(work), str(out), chunk_bytes="64MB", num_workers=1)


def open_litdata(work: Path, workers: int, batch: int) -> Epochs:
    """LitData."""
    from litdata import StreamingDataLoader, StreamingDataset

    prepare = decode_and_transform()

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return prepare(sample["image"]), sample["label"]

    dataset = Photos(str(work / "litdata"), shuffle=True, drop_last=True)
    return through(StreamingDataLoader, dataset, workers, batch_size=batch, drop_last=True)


# ----- peers with decoders and threads of their own


def pack_ffcv(work: Path, out: Path) -> None:
    """FFCV's file, photos re-encoded by it."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    image = RGBImageField(write_mode="jpg", jpeg_quality=FFCV_QUALITY)
    writer = DatasetWriter(str(out), {"image": image, "label": IntField()}, num_workers=2)
    writer.from_indexed_dataset(ImageFolder(str(work / "photos" / "train")))


def pack_reencoded(work: Path, out: Path) -> None:
    """An ImageFolder of the very JPEGs that FFCV stores."""
    import numpy as np
    from ffcv.reader import Reader

    reader = Reader(str(work / "ffcv"))
    data = np.memmap(work / "ffcv", np.uint8, "r")
    sizes = {int(entry["ptr"]): int(entry["size"]) for entry in reader.alloc_table}
    for number, (image, label) in enumerate(reader.metadata):
        assert image["mode"] == 0, "FFCV stored pixels, not a JPEG"
        start = int(image["data_ptr"])
        path = out / "train" / f"class_{label}" / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[start : start + sizes[start]].tobytes())


def open_ffcv(work: Path, workers: int, batch: int) -> Epochs:
    """FFCV."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE))
    loader = Loader(
        str(work / "ffcv"),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        batches_ahead=PREFETCH,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return lambda _: (images for images, _ in loader)


def open_dali(device: str, work: Path, workers: int, batch: int) -> Epochs:
    """DALI on the CPU, or on the GPU (device: mixed), where its decoder is the GPU's."""
    import torch
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    if device == "mixed" and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU")

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch,
        num_threads=workers,
        device_id=0 if device == "mixed" else None,
        prefetch_queue_depth=PREFETCH,
    )
    def crops() -> tuple[Any, Any]:
        files = str(work / "photos" / "train")
        encoded, labels = fn.readers.file(file_root=files, random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            encoded, device=device, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    loader = DALIGenericIterator(
        crops(),
        ["images", "labels"],
        reader_name="files",
        auto_reset=True,
        last_batch_policy=LastBatchPolicy.DROP,
    )
    return lambda _: (made[0]["images"] for made in loader)


def open_spdl(work: Path, workers: int, batch: int) -> Epochs:
    """SPDL: files through FFmpeg, whose filters crop, resize and flip."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    paths = [path for path, _ in photos(work)]

    def decode(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        left, top, width, height = random_box(packets.width, packets.height)
        flip = ",hflip" if random.random() < 0.5 else ""  # noqa: S311
        return spdl.io.decode_packets(
            packets,
            f"crop={width}:{height}:{left}:{top},scale={SIZE}:{SIZE}:flags=bilinear{flip},"
            "format=rgb24",
        )

    def epochs(epoch: int) -> Iterator[Any]:
        random.Random(epoch).shuffle(paths)  # noqa: S311
        pipeline = (
            PipelineBuilder()
            .add_source(paths)
            .pipe(decode, concurrency=workers)
            .aggregate(batch, drop_last=True)
            .pipe(spdl.io.convert_frames)
            .add_sink(PREFETCH)
            .build(num_threads=workers, max_failures=0)
        )
        with pipeline.auto_stop():
            for images in pipeline:
                yield spdl.io.to_torch(images)

    return epochs


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height as torchvision's RandomResizedCrop draws them."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)  # noqa: S311
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))  # noqa: S311
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h  # noqa: S311
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


# ----- what there is


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A form of the photos, WORK/<its name>."""

    pack: Callable[[Path, Path], None]
    """(work, what to make)"""
    venv: str = ""
    needs: str = ""
    """The format that it is made of."""


FORMATS = {
    "shards": Format(pack=partial(pack_shards, "photos")),
    "bare": Format(pack=pack_bare),
    "mosaic": Format(pack=pack_mosaic, venv="mosaic"),
    "litdata": Format(pack=pack_litdata, venv="litdata"),
    "ffcv": Format(pack=pack_ffcv, venv="ffcv"),
    "reencoded": Format(pack=pack_reencoded, venv="ffcv", needs="ffcv"),
    "reencoded-shards": Format(pack=partial(pack_shards, "reencoded"), needs="reencoded"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A loader, and where it runs."""

    title: str
    open: Callable[[Path, int, int], Epochs]
    """(work, workers, batch)"""
    format: str = ""
    """What it reads; empty: the photos themselves."""
    venv: str = ""
    """Its interpreter: .bench/<venv>, or the current one where that is not there."""
    package: str = ""
    simd: bool | None = None
    """Whether it has to be Pillow-SIMD that it decodes with."""
    rival: str = "ours"
    """The one of ours that it is compared with: the one on the same images."""


CONTENDERS = {
    "ours": Contender(
        title="shardstream", open=partial(open_ours, "shards", "auto"), format="shards"
    ),
    "ours-pillow": Contender(
        title="shardstream, Pillow decoder",
        open=partial(open_ours, "shards", "pillow"),
        format="shards",
    ),
    "ours-ffcv": Contender(
        title="shardstream on FFCV's images",
        open=partial(open_ours, "reencoded-shards", "auto"),
        format="reencoded-shards",
        rival="",
    ),
    "torchvision": Contender(
        title="torchvision ImageFolder, Pillow",
        open=open_torchvision,
        venv="pillow",
        package="torchvision",
        simd=False,
    ),
    "torchvision-simd": Contender(
        title="torchvision ImageFolder, Pillow-SIMD",
        open=open_torchvision,
        package="torchvision",
        simd=True,
    ),
    "webdataset": Contender(
        title="webdataset, Pillow",
        open=open_webdataset,
        format="shards",
        venv="pillow",
        package="webdataset",
        simd=False,
    ),
    "webdataset-simd": Contender(
        title="webdataset, Pillow-SIMD",
        open=open_webdataset,
        format="shards",
        package="webdataset",
        simd=True,
    ),
    "mosaic": Contender(
        title="MosaicML Streaming",
        open=open_mosaic,
        format="mosaic",
        venv="mosaic",
        package="mosaicml-streaming",
    ),
    "litdata": Contender(
        title="LitData", open=open_litdata, format="litdata", venv="litdata", package="litdata"
    ),
    "ffcv": Contender(
        title=f"FFCV (re-encoded, q{FFCV_QUALITY})",
        open=open_ffcv,
        format="ffcv",
        venv="ffcv",
        package="ffcv",
        rival="ours-ffcv",
    ),
    "dali": Contender(
        title="DALI on the CPU",
        open=partial(open_dali, "cpu"),
        venv="dali",
        package="nvidia-dali-cuda130",
    ),
    "dali-gpu": Contender(
        title="DALI on the GPU",
        open=partial(open_dali, "mixed"),
        venv="dali",
        package="nvidia-dali-cuda130",
    ),
    "spdl": Contender(title="SPDL", open=open_spdl, venv="spdl", package="spdl"),
    "bare": Contender(title="bare limit: region decode in C", open=open_bare, format="bare"),
}


def facts(name: str) -> dict[str, str]:
    """What a contender is, once its interpreter runs it. Exits if it is not what it has to be."""
    import PIL

    contender = CONTENDERS[name]
    if contender.simd not in {None, ".post" in PIL.__version__}:
        sys.exit(f"its interpreter has Pillow {PIL.__version__}")
    known = {"python": sys.version.split()[0], "torch": version("torch"), "pillow": PIL.__version__}
    if contender.package:
        known[contender.package] = version(contender.package)
    if name.startswith("ours"):
        from loaders.decode import decoder_name

        known["decoder"] = decoder_name("pillow" if name == "ours-pillow" else "auto")
    return known


def measure(batches: Iterable[Any], *, skip: int) -> tuple[int, int, float]:
    """Iterate an epoch: (images in all, images after the first `skip` batches, their seconds)."""
    total = before = 0
    start = stop = math.nan
    for number, images in enumerate(batches, 1):
        if isinstance(images, int):
            total += images
        else:
            assert tuple(images.shape[1:]) == (SIZE, SIZE, 3), images.shape
            assert str(images.dtype) == "torch.uint8", images.dtype
            total += len(images)
        stop = time.perf_counter()
        if number == skip:
            before, start = total, stop
    return total, total - before, stop - start


def serve(name: str, work: Path, batch: int) -> None:
    """Iterate one epoch for each line 'workers epoch' read; print the result as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(1)
    images = len(photos(work))
    opened: dict[int, Epochs] = {}
    print(json.dumps(facts(name)), file=answers, flush=True)
    for line in sys.stdin:
        workers, epoch = map(int, line.split())
        if workers not in opened:
            opened[workers] = CONTENDERS[name].open(work, workers, batch)
        total, timed, seconds = measure(opened[workers](epoch), skip=warm_up_batches(workers))
        # Each worker may keep back what does not fill a batch.
        assert images - workers * batch < total <= images, f"{total} images of {images} came"
        print(json.dumps({"images": timed, "seconds": seconds}), file=answers, flush=True)


def main() -> None:
    """Pack or serve; bench_loader.py reads the last line of stderr where that fails."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    action, name, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if action == "pack":
        FORMATS[name].pack(work, work / name)
    else:
        serve(name, work, int(sys.argv[4]))


if __name__ == "__main__":
    main()
