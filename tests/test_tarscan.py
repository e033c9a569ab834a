"""Strict scan: what any writer makes of plain files is read right; all else is refused by name."""

import io
import lzma
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sharding import tar
from sharding.errors import DataError
from sharding.tarscan import NAME_LIMIT, scan

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
LONG = f"{'d' * 80}/{'é' * 60}/x.jpg"
Files = dict[str, bytes]

part = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
part = part | st.sampled_from(["__x__", "x.y", "n" * 90, "é" * 60, "\\", " ", "\n", "..."])
names = st.lists(part.filter(lambda p: p not in {".", ".."}), min_size=1, max_size=4).map("/".join)


class Bytes:
    """A blob in memory that counts its reads."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.reads: list[int] = []

    def read_at(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= self.size
        self.reads.append(size)
        return self.data[offset : offset + size]


def files_in(data: bytes) -> list[tuple[str, bytes]]:
    """Names and bytes as the scan finds them."""
    found = scan(Bytes(data), "x.tar")
    return [(member.name, data[member.offset :][: member.size]) for member in found]


def made_by_tarfile(files: Files, kind: str, folders: tuple[str, ...] = ()) -> bytes:
    """A tar as Python's tarfile writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as archive:
        for name in folders:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1234567890.25  # a PAX header for the fraction
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def head(name: bytes = b"a.jpg", *, kind: bytes = b"0", size: bytes = b"", at: int = 0) -> bytes:
    """A header with a right checksum; the name may go elsewhere."""
    block = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
    block[at : at + len(name)] = name
    block[124:136] = (size or b"%011o" % 0).ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(kind: bytes, content: bytes) -> bytes:
    """A PAX header or a GNU long name with its content."""
    padded = content + bytes(-len(content) % tar.BLOCK)
    return head(b"extended", kind=kind, size=b"%011o" % len(content)) + padded


def record(key: str, value: str) -> bytes:
    """A PAX record."""
    return tar._pax_record(key.encode(), value.encode())


@settings(deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(names, st.binary(max_size=1500)))
@example("gnu", {"n" * 99: b"1", "n" * 100: b"2", "n" * 101: b"3", LONG: b"4"})
@example("pax", {"n" * 99: b"1", "n" * 100: b"2", "n" * 101: b"3", LONG: b"4", "./a.jpg": b""})
@example("ustar", {f"{'d' * 99}/{'n' * 99}": bytes(512), f"{'d' * 155}/{'n' * 100}": bytes(513)})
def test_tarfile(kind: str, files: Files) -> None:
    """Every file that Python's tarfile writes is found, in order, in each of its formats."""
    try:
        data = made_by_tarfile(files, kind, ("folder", "." if files else "./x"))
    except ValueError:  # a name too long for ustar
        assume(False)
    assert files_in(data) == list(files.items())


@settings(deadline=None)
@given(st.dictionaries(names.filter(lambda n: n[0] != "_"), st.binary(max_size=999), max_size=4))
def test_webdataset(samples: Files) -> None:
    """Every file that webdataset's TarWriter writes is found."""
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, encoder=False) as writer:
        for key, data in samples.items():
            writer.write({"__key__": key, "jpg": data, "cls": b"7"})
    expected = [
        (f"{key}.{extension}", content)
        for key, data in samples.items()
        for extension, content in (("cls", b"7"), ("jpg", data))
    ]
    assert files_in(buffer.getvalue()) == expected


@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_gnu_tar(kind: str, tmp_path: Path) -> None:
    """GNU tar's own tars of a folder are read in each of its formats, folders left out."""
    files = {"./a/x.jpg": b"1" * 513, "./a/y.cls": b"", "./é.png": b"2"}
    if kind != "v7":
        files[f"./{'n' * 94}/{'m' * 90}.jpg"] = b"long"
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    run = ["tar", "cf", "-", f"--format={kind}", "-C", str(tmp_path), "."]
    data = subprocess.run(run, capture_output=True, check=True).stdout
    assert sorted(files_in(data)) == sorted(files.items())


def test_our_own() -> None:
    """What the packer writes is read: short and long names, folders with dots."""
    files = {"a/x.jpg": b"1", f"b/{'y' * 98}.png": bytes(512), "é.1/z.webp": bytes(513)}
    data = b"".join(b"".join(tar.member(*file)) for file in files.items()) + tar.END
    assert files_in(data) == list(files.items())


def small(kind: str) -> tuple[Files, bytes]:
    """A small tar with all the headers that its format has."""
    files = {"a.jpg": b"1" * 700, LONG if kind != "ustar" else "b.jpg": b"", "c.cls": b"3"}
    return files, made_by_tarfile(files, kind, ("folder",))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut(kind: str) -> None:
    """A tar cut anywhere is refused, unless only zeros behind the end marker are lost."""
    files, data = small(kind)
    end = len(data.rstrip(b"\0")) // tar.BLOCK * tar.BLOCK + 3 * tar.BLOCK
    for size in {*range(0, len(data), tar.BLOCK), *range(1, len(data), 97)}:
        if size >= end and not size % tar.BLOCK:
            assert files_in(data[:size]) == list(files.items())
        else:
            with pytest.raises(DataError, match=r"x\.tar.*(cut|empty)"):
                files_in(data[:size])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_zeroed_block(kind: str) -> None:
    """A header that was zeroed is never taken for the end; the data's blocks are not checked."""
    files, data = small(kind)
    headers = {at for at in range(0, len(data), tar.BLOCK) if data[at + 257 :][:5] == b"ustar"}
    assert len(headers) == {"ustar": 4, "gnu": 5, "pax": 7}[kind]
    for at in headers:
        for blocks in (1, 2, 4):
            zeroed = data[:at] + bytes(blocks * tar.BLOCK) + data[at + blocks * tar.BLOCK :]
            if any(zeroed[at:]):
                with pytest.raises(DataError, match=r"damaged|zeros|missing|end marker|PAX record"):
                    files_in(zeroed)
    assert files_in(data) == list(files.items())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_flipped_header_bit(kind: str) -> None:
    """A flipped bit in a header changes nothing, or is an error; never a name, size or member."""
    files, data = small(kind)
    headers = [at for at in range(0, len(data), tar.BLOCK) if data[at + 257 :][:5] == b"ustar"]
    harmless = 0
    for at in headers:
        for bit in range(8 * tar.BLOCK):
            flipped = bytearray(data)
            flipped[at + bit // 8] ^= 1 << bit % 8
            try:
                assert files_in(bytes(flipped)) == list(files.items())
                harmless += 1
            except DataError:
                pass
    assert harmless <= 12 * len(headers)  # spaces and NULs around the checksum itself


JPG = head()
HUGE = b"%011o" % 0o77777777777
HOSTILE = {
    "hard link": (head(kind=b"1"), "'a.jpg' at offset 0 is a hard link"),
    "symlink": (JPG + head(kind=b"2"), "'a.jpg' at offset 512 is a symbolic link"),
    "character device": (head(kind=b"3"), "is a character device"),
    "block device": (head(kind=b"4"), "is a block device"),
    "fifo": (head(kind=b"6"), "is a FIFO"),
    "contiguous": (head(kind=b"7"), "is a contiguous file"),
    "GNU sparse": (head(kind=b"S"), "is a sparse file"),
    "long link": (head(kind=b"K"), "is a link"),
    "volume": (head(kind=b"V"), "of type b'V'"),
    "pax sparse": (extended(b"x", record("GNU.sparse.major", "1")) + JPG, "key b'GNU.sparse.maj"),
    "pax size": (extended(b"x", record("size", "9")) + JPG, "key b'size'"),
    "pax linkpath": (extended(b"x", record("linkpath", "/etc")) + JPG, "key b'linkpath'"),
    "pax unknown": (extended(b"x", record("qath", "b")) + JPG, "key b'qath'"),
    "pax twice": (extended(b"x", 2 * record("path", "b")) + JPG, "key b'path' twice"),
    "two pax": (2 * extended(b"x", record("path", "b")) + JPG, "two extended headers"),
    "pax and long name": (
        extended(b"x", b"") + extended(b"L", b"b") + JPG,
        "two extended headers",
    ),
    "pax without member": (extended(b"x", record("path", "b")), "is missing behind its ext"),
    "pax length": (extended(b"x", b"99 path=b\n") + JPG, "damaged PAX record"),
    "pax signed length": (extended(b"x", b"+9 path=b\n") + JPG, "damaged PAX record"),
    "pax no newline": (extended(b"x", b"9 path=bc") + JPG, "damaged PAX record"),
    "pax short": (extended(b"x", b"3 path=b\n") + JPG, "damaged PAX record"),
    "global path": (extended(b"g", record("path", "b")) + JPG, "key b'path'"),
    "global size": (extended(b"g", record("size", "1")) + JPG, "key b'size'"),
    "global linkpath": (extended(b"g", record("linkpath", "b")) + JPG, "key b'linkpath'"),
    "huge pax": (head(kind=b"x", size=HUGE), "of 8589934591 bytes; the limit is 65536"),
    "huge long name": (head(kind=b"L", size=HUGE), "of 8589934591 bytes; the limit is 65536"),
    "huge member": (head(size=HUGE), "has 8589934591 bytes; the limit"),
    "base 256": (head(size=b"\x80" + b"\xff" * 11), "has 309485009821345068724781055 bytes"),
    "negative": (head(size=b"\xff" * 12), "where a number should be"),
    "signed size": (head(size=b"-1"), "where a number should be"),
    "underscore size": (head(size=b"1_0"), "where a number should be"),
    "no size": (head(size=b" " * 12), "where a number should be"),
    "behind the end": (
        head(size=b"%011o" % 9999),
        "at offset 0 ends 9216 bytes behind the file's end",
    ),
    "folder with bytes": (head(b"a/", kind=b"5", size=b"1"), "folder that claims 1 bytes"),
    "absolute": (head(b"/etc/a.jpg"), "outward name"),
    "outward": (head(b"a/../../b.jpg"), "outward name"),
    "outward folder": (head(b"../", kind=b"5"), "outward name"),
    "outward long name": (extended(b"L", b"../b\0") + JPG, r"'\.\./b' at offset 1024 .*outward"),
    "outward path": (extended(b"x", record("path", "/b")) + JPG, "outward name"),
    "dot": (head(b"a/."), "outward name"),
    "empty part": (head(b"a//b"), "empty, absolute"),
    "empty": (head(b""), "empty, absolute"),
    "empty path": (extended(b"x", record("path", "")) + JPG, "gives an empty name"),
    "empty long name": (extended(b"L", b"\0") + JPG, "gives an empty name"),
    "file like a folder": (head(b"a/"), "empty, absolute"),
    "NUL": (head(b"a\0.jpg"), "NUL byte"),
    "NUL in path": (extended(b"x", record("path", "a\0b")) + JPG, "NUL byte"),
    "NUL in long name": (extended(b"L", b"a\0b\0") + JPG, "NUL byte"),
    "not UTF-8": (head(b"\xff.jpg"), "not UTF-8"),
    "long": (extended(b"L", b"n" * (NAME_LIMIT + 1)) + JPG, "has a name of 4097 bytes"),
    "unknown format": (head(b"what", at=257), "unknown tar format"),
    "lone zeros": (JPG + bytes(512) + JPG, "behind a block of zeros"),
    "second tar": (JPG + tar.END + JPG, "goes on after its end marker at offset 512"),
    "late byte": (JPG + tar.END + bytes(1 << 20) + b"1".rjust(512), "goes on after its end mar"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile(data: bytes, message: str) -> None:
    """Each is refused, naming the shard, the member and why."""
    with pytest.raises(DataError, match=rf"x\.tar.*{message}"):
        files_in(data + tar.END)


def test_what_is_harmless() -> None:
    """Global comments, attributes, folders, odd names and sizes with spaces are accepted."""
    data = b"".join(
        [
            extended(b"g", record("comment", "of git archive")),
            extended(b"x", record("uname", "me") + record("LIBARCHIVE.xattr.user.x", "1=\n2")),
            head(b"a\\b..c.jpg", size=b"         3 "),
            b"abc".ljust(512, b"\0"),
            head(b"old/", kind=b"\0"),
            head(b"old", kind=b"\0", size=b"\x80" + b"\3".rjust(11, b"\0")),
            b"def".ljust(512, b"\0"),
            tar.END,
        ]
    )
    assert files_in(data) == [("a\\b..c.jpg", b"abc"), ("old", b"def")]
    assert files_in(tar.END) == []


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed(kind: str) -> None:
    """A compressed tar is named as such; a name that begins like one is none."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match=r"x\.tar is compressed"):
        files_in(buffer.getvalue())
    assert files_in(head(b"BZh.jpg") + tar.END) == [("BZh.jpg", b"")]


def test_no_tar() -> None:
    """An empty file, a short one and one of other bytes are refused."""
    for data, message in [
        (b"", "is empty"),
        (b"abc", "has 3 bytes, no multiple of 512"),
        (bytes(512), "end marker|cut"),
        (lzma.compress(b"1", lzma.FORMAT_ALONE).ljust(1024), "wrong checksum"),
    ]:
        with pytest.raises(DataError, match=message):
            files_in(data)


@pytest.mark.parametrize(
    "data",
    [
        head(kind=b"S", size=b"%011o" % 300_000_000),
        head(kind=b"x", size=b"\x80" + (1 << 32).to_bytes(11, "big")),
        head(kind=b"L", size=HUGE),
        head(size=HUGE),
    ],
    ids=["sparse", "pax", "long name", "file"],
)
def test_claims_allocate_nothing(data: bytes) -> None:
    """A header of 512 bytes that claims 300 MB or 4 GB takes less than 100 KB to refuse."""
    tracemalloc.start()
    with pytest.raises(DataError):
        files_in(data + tar.END)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_data_is_not_read() -> None:
    """Of large files only a read-ahead is read; many small files share a read."""
    large = Bytes(made_by_tarfile({f"{i}.jpg": bytes(1 << 20) for i in range(8)}, "ustar"))
    assert len(list(scan(large, "x"))) == 8
    assert sum(large.reads) <= 10 * (1 << 14)
    files = {f"{i}.{kind}": bytes(99) for i in range(200) for kind in ("jpg", "cls")}
    many = Bytes(made_by_tarfile(files, "ustar"))
    assert len(list(scan(many, "x"))) == 400
    assert len(many.reads) <= many.size // (1 << 14) * 1.1 + 4
