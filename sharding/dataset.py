"""A packed split as it lies in a store: its manifest, and the way to its indexes and tars."""

from dataclasses import dataclass

from sharding.errors import DataError
from sharding.index import SampleIndex
from sharding.layouts import SPLITS
from sharding.manifest import MANIFEST_NAME, Manifest
from sharding.store import Blob, Store, locate, open_store
from sharding.unpacked import unpacked

_REMEDY = "copy it again from where it was packed, or remove the split and pack again"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSplit:
    """A manifest and the store that it was read from."""

    store: Store
    manifest: Manifest

    @classmethod
    def open(cls, url: str) -> "PackedSplit":
        """The finished split at this path or URL. Raises DataError where there is none."""
        store = open_store(url)
        try:
            text = store.read(MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{url} has no {MANIFEST_NAME}: {unpacked(url)}") from error
        return cls(
            store=store, manifest=Manifest.from_json(text, where=f"{store.url}/{MANIFEST_NAME}")
        )

    def where(self, shard: int) -> str:
        """Full name of a shard, for people."""
        store, name = self._place(shard)
        return f"{store.url}/{name}"

    def open_tar(self, shard: int) -> Blob:
        """The tar, for ranged reads.

        Raises DataError if it is missing or of another size; a remote one's reads do so.
        """
        store, name = self._place(shard)
        expected = self.manifest.shards[shard].bytes
        try:
            blob = store.open(name, expected)
        except FileNotFoundError as error:
            raise DataError(f"{self.where(shard)} is missing; {_REMEDY}") from error
        if blob.size != expected:
            raise DataError(
                f"{self.where(shard)} has {blob.size} bytes, the manifest says {expected}; "
                f"{_REMEDY}"
            )
        return blob

    def read_index(self, shard: int) -> SampleIndex:
        """The shard's sample index. Raises DataError if it is missing or not the manifest's."""
        name = self.manifest.index_name(shard)
        where = f"{self.store.url}/{name}"
        try:
            data = self.store.read(name)
        except FileNotFoundError as error:
            raise DataError(f"{where} is missing; {_REMEDY}") from error
        return SampleIndex.from_bytes(data, shard=self.manifest.shards[shard], where=where)

    def check_present(self) -> None:
        """Fail now if a tar or an index is missing or a tar has another size.

        One listing of a folder finds the copy that was not finished; bytes are checked when they
        are read.
        """
        listed: dict[str, dict[str, int]] = {}
        for number, shard in enumerate(self.manifest.shards):
            for store, name, size in (
                (*self._place(number), shard.bytes),
                (self.store, self.manifest.index_name(number), None),
            ):
                sizes = listed.setdefault(store.url, {})
                if not sizes:
                    sizes.update(store.sizes())
                if name not in sizes:
                    raise DataError(f"{store.url}/{name} is missing; {_REMEDY}")
                if size not in (None, sizes[name]):
                    raise DataError(
                        f"{store.url}/{name} has {sizes[name]} bytes, the manifest says {size}; "
                        f"{_REMEDY}"
                    )

    def _place(self, shard: int) -> tuple[Store, str]:
        return locate(self.store, self.manifest.shards[shard].url)


def open_splits(url: str) -> dict[str, PackedSplit]:
    """All finished splits of a data set: of the folder's train/ and val/, or the folder itself."""
    if MANIFEST_NAME in open_store(url).sizes():
        split = PackedSplit.open(url)
        return {split.manifest.split: split}
    folder = url.rstrip("/")
    found = {
        name: PackedSplit.open(f"{folder}/{name}")
        for name in SPLITS
        if MANIFEST_NAME in open_store(f"{folder}/{name}").sizes()
    }
    if not found:
        raise DataError(
            f"{url} holds no packed data set, no {MANIFEST_NAME} in it, in its train/ or in its "
            f"val/: {unpacked(url)}"
        )
    return found
