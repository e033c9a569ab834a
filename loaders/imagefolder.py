"""The same samples straight from an ImageFolder: the baseline, and for first experiments.

The packer's plan is computed from the listing and not carried out: a sample has the number that it
would have in the shards, so the order and the batches are the same, without packing.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from loaders.reader import BadSampleError, Facts
from sharding.manifest import Packing
from sharding.plan import plan_shards
from sharding.source import Listing
from sharding.streams import Integers
from sharding.tar import member_name


class FolderReader:
    """Reads each sample from its own file."""

    def __init__(self, listing: Listing, packing: Packing) -> None:
        shards = plan_shards(listing.sizes, packing)
        self._listing = listing
        self._order = np.concatenate(shards)
        self.counts = [len(shard) for shard in shards]
        self.classes = listing.classes
        self.remote = False
        self.cached = 0
        identity = xxhash.xxh3_128()
        for part in ("\0".join(listing.classes), "\0".join(listing.paths), str(packing)):
            identity.update(part.encode())
        identity.update(listing.sizes.tobytes())
        self.digest = f"imagefolder-{identity.hexdigest()}"

    def facts(self, numbers: Integers) -> Facts:
        """See Reader. Sizes are unknown until the bytes are read."""
        labels = self._listing.labels[self._order[numbers]].astype(np.int64)
        unknown = np.zeros(len(numbers), np.int64)
        return Facts(labels, unknown, unknown)

    def read(self, number: int) -> bytes:
        """See Reader. Only the size tells whether a file was changed."""
        try:
            data = self._file(number).read_bytes()
        except (FileNotFoundError, IsADirectoryError):  # told below, by its size
            data = b""
        expected = int(self._listing.sizes[self._order[number]])
        if len(data) != expected:
            raise BadSampleError(
                f"{self.describe(number)}: has {len(data)} bytes, {expected} when it was listed",
                number,
            )
        return data

    def unopened(self, numbers: Integers) -> list[Callable[[], None]]:
        """See Reader. A file is opened when it is read."""
        return []

    def key(self, number: int) -> str:
        """See Reader."""
        return member_name(self._listing.paths[int(self._order[number])])[0]

    def describe(self, number: int) -> str:
        """See Reader."""
        return str(self._file(number))

    def network(self) -> tuple[int, int]:
        """See Reader."""
        return 0, 0

    def _file(self, number: int) -> Path:
        return self._listing.root / self._listing.files[int(self._order[number])]
