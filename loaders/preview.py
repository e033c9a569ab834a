"""What training is given of some samples in some epochs, to be looked at.

The crops come out of the loader's own pipeline, so they are bit for bit those that a run of this
seed gets.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from PIL import Image

from loaders.augment import AugmentConfig, Crops, Draw, random_crops
from loaders.blocks import Blocks
from loaders.datamodule import DataConfig
from loaders.decode import DecodeError, decode_by_pillow, get_decoder, image_size
from loaders.order import Order, OrderConfig
from loaders.pipeline import Planned, make_pipeline
from loaders.policy import finish
from loaders.reader import Facts, Reader, ShardReader
from loaders.sheet import Crop, Pixels, Shown, sheet
from loaders.sizes import Sizes
from loaders.stats import Stats
from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError

EPOCHS = 5
"""How many are shown."""


def draw_preview(
    split: PackedSplit,
    config: DataConfig,
    *,
    title: str,
    seed: int,
    epoch: int,
    samples: int,
    notes: Sequence[str] = (),
) -> Image.Image:
    """The sheet of a packed split under the data section of a recipe.

    title: names both. epoch: the first one shown. notes: lines below those that say what is seen.
    Raises UsageError for a seed that is out of range, DataError as `look` does.
    """
    try:
        order = OrderConfig(seed=seed, lanes=config.lanes, window=config.window)
    except ValueError as error:
        raise UsageError(str(error)) from error
    shown = look(
        ShardReader(split),
        order=order,
        augment=config.augment,
        sizes=Sizes(size=config.train_size, progressive=config.progressive),
        decoder=config.decoder,
        samples=samples,
        epochs=range(epoch, epoch + EPOCHS),
    )
    seen = (
        f"The first {len(shown)} of {split.manifest.samples:,} samples in the order of epoch "
        f"{epoch}, seed {seed}. Below each crop: its share of the image."
    )
    return sheet(shown, title=title, notes=[seen, _in_words(config.augment), *notes])


def look(
    reader: Reader,
    *,
    order: OrderConfig,
    augment: AugmentConfig,
    sizes: Sizes,
    decoder: str = "auto",
    samples: int,
    epochs: Sequence[int],
) -> list[Shown]:
    """The first samples of the first of these epochs, each with its crops of all of them.

    samples: how many, or what there is. Raises DataError for bytes that are not what they should
    be, naming the sample.
    """
    whole = Order(reader.counts, order)
    count = min(samples, whole.samples)
    numbers = whole.part(epoch=epochs[0], step=0, batch=count, rank=0, world=1)
    used: list[Crops] = []

    def crops(draw: Draw, facts: Facts) -> Crops:
        used.append(random_crops(draw, facts.widths, facts.heights, augment))
        return used[-1]

    def plan() -> Iterator[Planned]:
        for epoch in epochs:
            draw = Draw(order.seed, epoch, numbers, np.zeros_like(numbers))
            yield Planned(epoch, sizes.at(epoch), draw)

    pipeline = make_pipeline(
        plan,
        reader,
        crops,
        get_decoder(decoder),
        finish=partial(finish, config=augment),
        blocks=Blocks(workers=0, prefetch=1, size=0),
        stats=Stats(1),
    )
    batches = []
    for made in pipeline:
        if isinstance(made.batch, Exception):
            raise made.batch
        batches.append(made.batch)
    labels = reader.facts(numbers).labels.tolist()
    return [
        Shown(
            reader.classes[label],
            reader.key(number),
            *_stored(reader, number),
            [
                Crop(epoch, batch.images[row].numpy(), tuple(boxes[row].tolist()), bool(flips[row]))
                for epoch, batch, (boxes, flips, _) in zip(epochs, batches, used, strict=True)
            ],
        )
        for row, (number, label) in enumerate(zip(numbers.tolist(), labels, strict=True))
    ]


def _stored(reader: Reader, number: int) -> tuple[Pixels, int]:
    """The whole image, and the bytes of its file."""
    data = reader.read(number)
    try:
        width, height = image_size(data)
        pixels = np.empty((height, width, 3), np.uint8)
        decode_by_pillow(pixels, data, (0, 0, width, height), flip=False, exact=True)
    except DecodeError as error:
        raise DataError(f"{reader.describe(number)}: cannot be decoded: {error}") from error
    return pixels, len(data)


def _in_words(augment: AugmentConfig) -> str:
    low, high = augment.crop_scale
    words = [
        f"Crops of {low:.0%} to {high:.0%} of the image",
        f"mirrored with probability {augment.flip_probability:g}",
    ]
    if augment.policy == "randaugment":
        words.append(f"randaugment, {augment.policy_ops} of magnitude {augment.policy_magnitude}")
    elif augment.policy != "none":
        words.append(augment.policy)
    if augment.erase_probability:
        words.append(f"erased with probability {augment.erase_probability:g}")
    return f"{', '.join(words)}."
