"""The LightningDataModule: a recipe's data section -> loaders for this rank."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning

from loaders.augment import AugmentConfig
from loaders.decode import get_decoder
from loaders.imagefolder import FolderReader
from loaders.loader import StreamingLoader
from loaders.order import Order, OrderConfig
from loaders.prefetch import CacheConfig
from loaders.reader import Reader, ShardReader
from loaders.sizes import ProgressiveConfig, Sizes
from loaders.topology import Topology, check_identity, run_identity
from loaders.validation import ValidationLoader
from sharding.dataset import PackedSplit
from sharding.errors import DataError
from sharding.manifest import Packing
from sharding.source import scan
from sharding.store import local_path

FORMATS = ("shards", "imagefolder")
MOST_BAD = 1000  # samples that are bad; more is not bad luck, but a bad data set
_TRAIN_SHARE = 0.9  # of the cache; ImageNet's training split is 95% of its bytes


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data is and how it is read."""

    root: str = "data/imagenet-shards"
    """Folder with train/ and val/: packed splits, or class folders for format imagefolder."""
    format: str = "shards"
    num_workers: int = 8
    """Loader processes of each rank."""
    prefetch: int = 2
    """Batches that each worker makes ahead."""
    train_size: int = 224
    """Pixels of a training image's side."""
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    repeats: int = 1
    """Repeated augmentation: how often each sample stands in a global batch."""
    val_resize: int = 256
    """Pixels of the shorter side before the centre crop: val_size / crop fraction."""
    val_size: int = 224
    val_interpolation: str = "bilinear"
    """bilinear or bicubic."""
    cache_dir: str | None = None
    """Folder on each node for shards that are elsewhere; null: the system's temporary folder for
    shards on S3, none for a file system; '': none."""
    cache_gb: float = 100.0
    """How much of it the processes of a node may fill, in 10^9 bytes."""
    decoder: str = "auto"
    """auto: the region decoder if it was built, else Pillow; or region, or pillow."""
    max_bad_samples: int = 0
    """So many bad samples of a rank are replaced by the next of their shards, with a line on stderr
    each time; one more, since the rank started, ends the run. Validation replaces none."""
    lanes: int = OrderConfig().lanes
    window: int = OrderConfig().window
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    packing: Packing = field(default_factory=Packing)
    """For format imagefolder: the options with which the shards were, or would be, packed."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.num_workers < 0 or self.prefetch < 1:
            raise ValueError(
                f"num_workers must be at least 0 and prefetch at least 1, got {self.num_workers} "
                f"and {self.prefetch}"
            )
        if not 1 <= self.val_size <= self.val_resize or self.train_size < 1:
            raise ValueError(
                f"sizes must be positive and val_size at most val_resize, got train_size "
                f"{self.train_size}, val_size {self.val_size}, val_resize {self.val_resize}"
            )
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb must be more than 0, got {self.cache_gb}")
        OrderConfig(lanes=self.lanes, window=self.window)  # checks both
        get_decoder(self.decoder, self.val_interpolation)
        if not 0 <= self.max_bad_samples <= MOST_BAD:
            raise ValueError(
                f"max_bad_samples must be in 0..{MOST_BAD}, got {self.max_bad_samples}"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def open_reader(config: DataConfig, split: str, classes: tuple[str, ...] | None = None) -> Reader:
    """The samples of a split, in either format. `classes` fixes labels for format imagefolder."""
    folder = f"{config.root.rstrip('/')}/{split}"
    if config.format == "imagefolder":
        return FolderReader(scan(local_path(folder), classes=classes), config.packing)
    packed = PackedSplit.open(folder)
    packed.check_present()
    return ShardReader(packed)


class ImageNetData(lightning.LightningDataModule):
    """Training and validation loaders of the rank that asks for them."""

    # A tiny validation split may leave a rank without a batch.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self, config: DataConfig, *, seed: int, batch_size: int, accumulate: int = 1
    ) -> None:
        """batch_size: samples of a rank's batch; the global batch follows from the trainer."""
        super().__init__()
        self.config = config
        self.train = open_reader(config, "train")
        self.val = open_reader(config, "val", self.train.classes)
        if self.val.classes != self.train.classes:
            raise DataError(
                f"{config.root}: train and val have different classes ({len(self.train.classes)} "
                f"and {len(self.val.classes)}); pack them together, from one folder"
            )
        self._order = OrderConfig(seed=seed, lanes=config.lanes, window=config.window)
        self._batch_size = batch_size
        self._accumulate = accumulate

    def steps(self, global_batch: int) -> int:
        """Optimizer steps of a training epoch. Raises UsageError if there is not even one."""
        return Order(self.train.counts, self._order).steps(global_batch)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to agree with.

        The loader's state says the same, but Lightning leaves it out when a checkpoint was made at
        an epoch's end.
        """
        return self.identity(self._topology().global_batch)

    def identity(self, global_batch: int) -> dict[str, Any]:
        """The same for a run of another, or no, trainer."""
        return run_identity(self.train, self._order, global_batch, self.config.repeats)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise UsageError if the checkpoint is of another data set, order or global batch."""
        check_identity(state_dict, self.state_dict())

    def train_dataloader(self) -> StreamingLoader:
        """The loader takes its epoch from the trainer, which knows it also after a resume."""
        assert self.trainer is not None
        trainer = self.trainer
        return self.train_loader(self._topology(), epoch_of=lambda: trainer.current_epoch)

    def train_loader(
        self,
        topology: Topology,
        *,
        workers: int | None = None,
        epoch_of: Callable[[], int] | None = None,
    ) -> StreamingLoader:
        """The training loader of any rank, with or without a trainer. workers: the recipe's."""
        return StreamingLoader(
            self.train,
            order=self._order,
            augment=self.config.augment,
            topology=topology,
            size=Sizes(size=self.config.train_size, progressive=self.config.progressive),
            workers=self.config.num_workers if workers is None else workers,
            prefetch=self.config.prefetch,
            decoder=self.config.decoder,
            epoch_of=epoch_of,
            cache=self._cache(_TRAIN_SHARE),
            max_bad_samples=self.config.max_bad_samples,
        )

    def val_dataloader(self) -> ValidationLoader:
        """Every sample of the validation split once over all ranks."""
        assert self.trainer is not None
        return ValidationLoader(
            self.val,
            batch=self._batch_size,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            resize=self.config.val_resize,
            size=self.config.val_size,
            workers=self.config.num_workers,
            prefetch=self.config.prefetch,
            decoder=self.config.decoder,
            interpolation=self.config.val_interpolation,
            cache=self._cache(1 - _TRAIN_SHARE),
        )

    def _cache(self, share: float) -> CacheConfig | None:
        """The cache of this rank, which has a share of its part of the node's."""
        folder = self.config.cache_dir
        if folder is None and "://" in self.config.root:
            folder = f"{tempfile.gettempdir()}/shardstream-cache-{os.getuid()}"
        if not folder or self.config.format != "shards":
            return None
        ranks = 1 if self.trainer is None else self.trainer.world_size // self.trainer.num_nodes
        node_limit = int(self.config.cache_gb * 1e9)
        return CacheConfig(
            folder=local_path(folder), limit=int(node_limit * share / ranks), node_limit=node_limit
        )

    def _topology(self) -> Topology:
        assert self.trainer is not None
        world = self.trainer.world_size
        return Topology(
            global_batch=self._batch_size * self._accumulate * world,
            rank=self.trainer.global_rank,
            world=world,
            accumulate=self._accumulate,
            repeats=self.config.repeats,
        )
