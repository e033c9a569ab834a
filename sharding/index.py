"""SampleIndex: the table of one shard's samples, one row each, in tar order."""

import io
import tokenize

import numpy as np
import numpy.typing as npt
import xxhash

from sharding.errors import DataError
from sharding.manifest import Shard

_FIELDS = [
    ("offset", "<u8"),  # of the image's first byte in the tar
    ("size", "<u4"),  # of the image in bytes
    ("label", "<u4"),
    ("xxh3", "<u8"),  # XXH3-64 of the image's bytes
    ("width", "<u2"),  # in pixels; 0 where unknown
    ("height", "<u2"),
]


class SampleIndex:
    """Rows of (offset, size, label, xxh3, width, height, key), as a numpy structured array.

    `key` is the sample's name in the tar without its extension, UTF-8 bytes.
    """

    def __init__(self, table: npt.NDArray[np.void]) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def from_rows(
        cls, rows: list[tuple[int, int, int, int, int, int]], keys: list[bytes]
    ) -> "SampleIndex":
        """Make an index of rows (offset, size, label, xxh3, width, height) and their keys."""
        table = np.zeros(len(rows), dtype=[*_FIELDS, ("key", f"S{max(map(len, keys))}")])
        for (name, _), column in zip(_FIELDS, zip(*rows, strict=True), strict=True):
            table[name] = column
        table["key"] = keys
        return cls(table)

    def key(self, row: int) -> str:
        """Name of the sample: its path in the tar without the extension."""
        return bytes(self.table["key"][row]).decode()

    def to_bytes(self) -> bytes:
        """The .npy file; the same rows give the same bytes."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, self.table, version=(1, 0), allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, *, shard: Shard, where: str) -> "SampleIndex":
        """Read an index and check that it is the one that the manifest means for this shard.

        The hash is checked first, so that nothing of a damaged or foreign file is parsed.
        Raises DataError, naming `where`, if hash, layout, number of rows or a row's range is wrong.
        """
        found = xxhash.xxh3_128_hexdigest(data)
        if found != shard.index_xxh128:
            raise DataError(
                f"{where} was changed or damaged, or belongs to another tar (XXH3-128 {found}, the "
                f"manifest says {shard.index_xxh128}); copy it again, or remove the split and pack "
                "again"
            )
        try:
            table = _parse(data)
            *fields, key = table.dtype.descr
            if fields != _FIELDS or key[0] != "key" or not key[1].startswith("|S"):
                raise ValueError(f"its layout is {table.dtype}")
            if len(table) != shard.samples:
                raise ValueError(f"it has {len(table)} rows, the manifest says {shard.samples}")
            if np.any(table["offset"] > shard.bytes) or np.any(
                table["offset"] + table["size"] > shard.bytes
            ):
                raise ValueError(f"a sample ends behind the tar's last byte {shard.bytes}")
        except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
            raise DataError(f"{where} is no sample index: {error}") from error
        return cls(table)


def _parse(data: bytes) -> npt.NDArray[np.void]:
    """Read a .npy file. Its size must be that of its shape: a few bytes could claim terabytes."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("it is no .npy file of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or len(shape) != 1 or shape[0] * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"{len(data)} bytes are no table of shape {shape} and type {dtype}")
    return np.frombuffer(data, dtype, offset=stream.tell())
