"""A tiny ImageFolder of all kinds of images, the shards packed of it, and loaders over both."""

import atexit
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from loaders.augment import AugmentConfig
from loaders.imagefolder import FolderReader
from loaders.loader import StreamingLoader
from loaders.order import OrderConfig
from loaders.pipeline import Batch
from loaders.reader import Reader, ShardReader
from loaders.sizes import Sizes
from loaders.topology import Topology
from sharding.dataset import PackedSplit
from sharding.manifest import Packing
from sharding.pack import Job, pack
from sharding.source import scan
from sharding.store import LocalStore

ORDER = OrderConfig(seed=5, lanes=8, window=4)
PACKING = Packing(seed=3, max_samples=7)
SAMPLES = {"train": 43, "val": 10}
GLOBAL_BATCH = 12
STEPS = 3  # of an epoch: 43 // 12
CLASSES = ("ant", "bee", "cat")

# Images that data sets hold beside plain JPEGs, by their number in the training split.
_SPECIAL: dict[int, tuple[str, str, dict[str, Any]]] = {
    1: ("CMYK", "JPEG", {}),
    4: ("L", "JPEG", {}),
    7: ("RGB", "PNG", {}),  # under the name .JPEG
    10: ("RGB", "JPEG", {"progressive": True}),
    13: ("RGBA", "WEBP", {"lossless": True}),
}


def picture(number: int, width: int, height: int) -> Image.Image:
    """A picture with shapes of all sizes, another one for each number."""
    rng = np.random.default_rng(number)
    coarse, fine = (
        Image.fromarray(rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), np.uint8))
        for cell in (16, 3)
    )
    whole = (width, height)
    return Image.blend(coarse.resize(whole, Image.Resampling.BICUBIC), fine.resize(whole), 0.25)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def data_set() -> Path:
    """Folder of images/ and of shards/, each with train/ and val/; lives as long as the process."""
    root = Path(tempfile.mkdtemp(prefix="shardstream-test-"))
    atexit.register(shutil.rmtree, root)
    for split, samples in SAMPLES.items():
        folder = root / "images" / split
        for number in range(samples):
            mode, kind, options = _SPECIAL.get(number, ("RGB", "JPEG", {}))
            name = CLASSES[number % 3]
            large = 4 if number % 5 == 0 else 1  # these are decoded at a reduced scale
            image = picture(number, large * (20 + number), large * (60 - number)).convert(mode)
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{name}_{number}.JPEG").write_bytes(encode(image, kind, **options))
        store = LocalStore(root / "shards" / split)
        listing = scan(folder, classes=CLASSES)
        pack(Job(listing=listing, store=store, split=split, packing=PACKING), workers=1)
    return root


def copy_of_shards(destination: Path) -> Path:
    """Shards to be damaged."""
    return shutil.copytree(data_set() / "shards", destination / "shards")


def open_shards(root: Path | None = None, split: str = "train") -> ShardReader:
    """Reader of a folder of shards, of the common data set's without one."""
    return ShardReader(PackedSplit.open(f"{root or data_set() / 'shards'}/{split}"))


def open_images(root: Path | None = None, packing: Packing = PACKING) -> FolderReader:
    """Reader of an ImageFolder's training split, of the common data set's without one."""
    return FolderReader(scan((root or data_set() / "images") / "train"), packing)


def make_loader(
    reader: Reader | None = None,
    *,
    order: OrderConfig = ORDER,
    workers: int = 0,
    global_batch: int = GLOBAL_BATCH,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    repeats: int = 1,
    augment: AugmentConfig | None = None,
    size: int | Sizes = 16,
    epoch_of: Callable[[], int] | None = None,
) -> StreamingLoader:
    """Loader of one rank, 16 x 16 pixels."""
    return StreamingLoader(
        reader or open_shards(),
        order=order,
        augment=augment or AugmentConfig(),
        topology=Topology(
            global_batch=global_batch,
            rank=rank,
            world=world,
            accumulate=accumulate,
            repeats=repeats,
        ),
        size=size,
        workers=workers,
        epoch_of=epoch_of,
    )


def ranks(world: int, reader: Reader | None = None, **options: Any) -> list[StreamingLoader]:
    """The loaders of all ranks; options are make_loader's."""
    reader = reader or open_shards()
    return [make_loader(reader, rank=rank, world=world, **options) for rank in range(world)]


def global_batches(loaders: list[StreamingLoader], accumulate: int = 1) -> list[Batch]:
    """The rest of the epoch from the loaders of all ranks, as whole global batches."""
    rounds = list(zip(*loaders, strict=True))
    steps = []
    for first in range(0, len(rounds), accumulate):
        by_rank = zip(*rounds[first : first + accumulate], strict=True)
        pieces = [batch for rank in by_rank for batch in rank]
        steps.append(Batch(*map(torch.cat, zip(*pieces, strict=True))))
    return steps


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    """The batches are bitwise the same: pixels, labels and sample numbers."""
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))
