"""How a run is cut into ranks and batches, and what has to stay the same for it to go on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loaders.order import OrderConfig
from loaders.reader import Reader
from sharding.errors import UsageError
from sharding.manifest import ORDER_VERSION

_BEFORE = {"repeats": 1}
"""What is meant where a state of an earlier release says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Which part of each global batch a rank delivers, and in how many pieces."""

    global_batch: int
    """Samples of one optimizer step, over all ranks."""
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    """Batches that a rank delivers for one optimizer step."""
    repeats: int = 1
    """Repeated augmentation (arXiv:1901.09335): how often each sample stands in a rank's part of
    the global batch, each time cropped and flipped anew. An epoch has as many batches as without,
    and so covers one of `repeats` samples."""

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.global_batch % (self.world * self.accumulate):
            raise UsageError(
                f"the global batch of {self.global_batch} is not divisible by {self.world} "
                f"processes x {self.accumulate} accumulated batches"
            )
        if self.repeats < 1 or self.global_batch % (self.world * self.repeats):
            raise UsageError(
                f"the global batch of {self.global_batch} is not divisible by {self.world} "
                f"processes x {self.repeats} repeats"
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not in 0..{self.world - 1}")

    @property
    def different(self) -> int:
        """Different samples of a global batch."""
        return self.global_batch // self.repeats

    @property
    def batch(self) -> int:
        """Samples in each batch that a rank delivers."""
        return self.global_batch // (self.world * self.accumulate)


def run_identity(
    reader: Reader, order: OrderConfig, global_batch: int, repeats: int
) -> dict[str, Any]:
    """What has to stay the same for a run to go on: data, order and global batch."""
    return {
        "order_version": ORDER_VERSION,
        "digest": reader.digest,
        "global_batch": global_batch,
        "repeats": repeats,
        **asdict(order),
    }


def check_identity(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise UsageError, naming both values, where a state's identity is not this run's."""
    for name, value in mine.items():
        found = state.get(name, _BEFORE.get(name))
        if found != value:
            remedy = (
                f"--global_batch_size {found} goes on with it; " if name == "global_batch" else ""
            )
            what = "data set (its digest)" if name == "digest" else name
            raise UsageError(
                f"cannot resume: the checkpoint's {what} is {found}, this run's is {value}; "
                f"{remedy}resume with the same data, seed, lanes, window, repeats and global "
                "batch, or start a new run"
            )
