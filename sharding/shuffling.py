"""How well the loader can shuffle samples that were put into shards by others."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.streams import Purpose, permutation, raw

_PLACES = 5  # of an epoch, at which `shuffle_quality` looks
_WELL_MIXED = 0.9

Labels = npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffleQuality:
    """How well the loader can shuffle a data set: classes among the samples that it mixes."""

    samples: int
    """That are mixed at a time."""
    seen: float
    """Classes among them, on average over an epoch."""
    full: float
    """Classes among as many samples of a full permutation, expected."""


def shuffle_quality(labels_by_shard: list[Labels], *, lanes: int, window: int) -> ShuffleQuality:
    """Count classes as one epoch of the loader meets them, by the rules of order.py.

    Shards in random order are laid end to end, samples inside each one permuted, the line cut into
    lanes, each lane jittered. The loader's next samples come from a window of each lane, all at the
    same place; the average is over windows at five places. Of a full permutation, m of N samples
    lack a class of n samples with a probability of (1 - m/N)^n, where n is small beside N.
    """
    parts: list[Labels] = []
    for shard in permutation(len(labels_by_shard), seed=0, purpose=Purpose.DEAL).tolist():
        labels = labels_by_shard[shard]
        order = permutation(len(labels), seed=0, purpose=Purpose.SAMPLES, item=shard)
        parts.append(labels[order])
    line = np.concatenate(parts)
    length = -(-len(line) // lanes)
    width = min(window, length)
    moved: list[Labels] = []
    for first in range(0, len(line), length):
        lane = line[first : first + length]
        jitter = raw(len(lane), seed=0, purpose=Purpose.JITTER, item=first // length) / 2**64
        moved.append(lane[np.argsort(np.arange(len(lane)) + jitter * window, kind="stable")])
    mixed = [
        np.concatenate([lane[at : at + width] for lane in moved])
        for at in np.linspace(0, length - width, _PLACES).astype(np.int64)
    ]
    counts = np.unique(line, return_counts=True)[1]
    return ShuffleQuality(
        samples=len(mixed[0]),
        seen=float(np.mean([len(np.unique(labels)) for labels in mixed])),
        full=float(np.sum(1 - (1 - len(mixed[0]) / len(line)) ** counts)),
    )


def sorted_warning(labels_by_shard: list[Labels], *, lanes: int, window: int) -> str | None:
    """What is to be said where classes stand in runs that the loader's shuffle does not break up.

    `labels_by_shard` are the labels of each shard's samples; lanes and window are the loader's.
    """
    mixed = shuffle_quality(labels_by_shard, lanes=lanes, window=window)
    if mixed.seen >= _WELL_MIXED * mixed.full:
        return None
    return (
        f"the classes stand in sorted runs: the {mixed.samples} samples that the loader mixes at a "
        f"time ({lanes} lanes, window {window}) are of {mixed.seen:.0f} classes, where a full "
        f"shuffle has {mixed.full:.0f}. Training suffers from that; `shard.py unpack` the data set "
        "and `shard.py pack` it again, which mixes all samples"
    )
