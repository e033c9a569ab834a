"""SampleIndex: the table of one shard's samples, and what is refused as one."""

import io
import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import DataError
from sharding.index import SampleIndex
from sharding.manifest import Shard

ROWS = [(512, 100, 0, 2**64 - 1, 65535, 1), (4000, 96, 2**32 - 1, 0, 0, 0)]
KEYS = [b"n01440764/n01440764_10026", "été/ñ".encode()]
GOOD = SampleIndex.from_rows(ROWS, KEYS)


def read(data: bytes, *, said: bytes | None = None) -> SampleIndex:
    """Read data as the index of a tar of 4,096 bytes; `said` is what the manifest hashed."""
    found = xxhash.xxh3_128_hexdigest(data if said is None else said)
    shard = Shard(url="t.tar", bytes=4096, samples=2, xxh128="", index_xxh128=found)
    return SampleIndex.from_bytes(data, shard=shard, where="/d/t.npy")


def npy(table: npt.ArrayLike, *, allow_pickle: bool = False) -> bytes:
    """Any array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_round_trip() -> None:
    """Rows and keys come back as they were, and the file's bytes stay what they are."""
    index = read(GOOD.to_bytes())
    assert [row[:6] for row in index.table.tolist()] == ROWS
    assert [index.key(i) for i in range(len(index))] == [key.decode() for key in KEYS]
    assert xxhash.xxh3_128_hexdigest(GOOD.to_bytes()) == "5fca819cea8002cfe5e88a44c2432c22"


@given(st.integers(0, len(GOOD.to_bytes()) - 1), st.integers(1, 255))
def test_any_changed_byte_is_found(at: int, flip: int) -> None:
    """A flipped byte anywhere is found by the hash, and the file is named."""
    data = bytearray(GOOD.to_bytes())
    data[at] ^= flip
    with pytest.raises(DataError, match=r"^/d/t\.npy was changed or damaged, or belongs to"):
        read(bytes(data), said=GOOD.to_bytes())


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    """An index that runs code when unpickled is refused, with the right hash too, and runs none."""
    exploit = Exploit(tmp_path / "ran")
    array = np.array([exploit, exploit], object)
    for data in (npy(array, allow_pickle=True), pickle.dumps(exploit)):
        with pytest.raises(DataError, match=r"^/d/t\.npy is no sample index"):
            read(data)
        with pytest.raises(DataError, match=r"^/d/t\.npy was changed"):
            read(data, said=GOOD.to_bytes())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("offset", "size"), [(4096, 1), (4097, 0), (0, 4097), (2**64 - 1, 1), (2**64 - 1, 2**32 - 1)]
)
def test_rows_beyond_the_tar(offset: int, size: int) -> None:
    """A row that ends behind the tar's last byte is refused, also where the sum wraps around."""
    hostile = SampleIndex.from_rows([ROWS[0], (offset, size, 0, 0, 0, 0)], KEYS)
    with pytest.raises(DataError, match="a sample ends behind the tar's last byte 4096"):
        read(hostile.to_bytes())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(GOOD.table[:1]), "it has 1 rows, the manifest says 2"),
        (npy(GOOD.table.reshape(2, 1)), "are no table of shape"),
        (npy(GOOD.table.astype(GOOD.table.dtype.newbyteorder(">"))), "its layout is"),
        (npy(GOOD.table[["offset", "size"]].astype("<u8,<u4")), "its layout is"),
        (npy(np.arange(2)), "its layout is int64"),
        (b"", "is no sample index"),
        (GOOD.to_bytes()[:-1], "is no sample index"),
        (GOOD.to_bytes()[:20], "is no sample index"),
    ],
)
def test_other_layouts(data: bytes, message: str) -> None:
    """A file with the right hash but another layout or length is refused."""
    with pytest.raises(DataError, match=message):
        read(data)
