"""Strict scan of a tar that anyone made: the name of each plain file, and where its bytes stand.

Reads old v7, POSIX ustar, PAX and GNU tar. Readers that are lenient lose samples without a word:
a cut at a member's end, a header of zeros or a flipped bit is the end of the tar to them. Here each
of these is an error, as is every member that is not simply a name and bytes: links, devices, sparse
and contiguous files, names that lead out of a folder, a size that another header overrides.

What has no checksum cannot be checked: the bytes of files, and names that stand in a PAX header or
a GNU long name (their form is checked, and PAX keys that are not known to be harmless are refused).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sharding.errors import DataError
from sharding.store import Blob
from sharding.tar import BLOCK

MEMBER_LIMIT = 1 << 32
"""A member has fewer bytes: a sample's size is 32 bits wide."""
EXTENDED_LIMIT = 1 << 16
"""A PAX header or a GNU long name has at most so many bytes."""
NAME_LIMIT = 4096
"""A name has at most so many bytes, as a path does on Linux."""

_AHEAD = 1 << 14  # holds a label, and the headers around it, with one request
_PIECE = 1 << 20

_FILE, _OLD_FILE, _FOLDER = b"0", b"\0", b"5"
_PAX, _PAX_GLOBAL, _LONG_NAME = b"x", b"g", b"L"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"K": "a link with a long name",
    b"S": "a sparse file",
}
# PAX keys that change neither a file's name (`path` is read) nor its bytes.
_HARMLESS = re.compile(
    rb"([amc]time|[ug]id|[ug]name|comment|SCHILY\.(dev|ino|nlink|fflags|acl\..*|xattr\..*)"
    rb"|(LIBARCHIVE|RHT|MSWINDOWS)\..*)",
    re.DOTALL,
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A plain file in a tar."""

    name: str
    offset: int
    """Of the first byte of its data in the tar."""
    size: int
    """Of its data in bytes."""


def scan(blob: Blob, where: str) -> Iterator[Member]:
    """Every plain file, in the order in which they stand; folders are passed over.

    Reads headers, at rising offsets, never the data of files larger than a read-ahead of 16 KiB;
    all that is read or kept of a member is bounded, whatever its headers claim. Two members may
    have one name. Raises DataError, naming `where`, the member and its offset, for anything but a
    whole, plain tar; what was yielded before stands in the tar as it was yielded.
    """
    ahead = _ReadAhead(blob)
    _check_beginning(ahead, where)
    at = 0
    while True:
        header, at = _next(ahead, at, where)
        if header is None:
            break
        end = at + _padded(header.size)
        if end > blob.size:
            what = f"ends {end - blob.size} bytes behind the file's end: it was cut"
            raise _refusal(where, at - BLOCK, header.name, what)
        if header.kind != _FOLDER:
            yield Member(name=header.name.decode(), offset=at, size=header.size)
        at = end
    for start in range(at, blob.size, _PIECE):
        piece = blob.read_at(start, min(_PIECE, blob.size - start))
        if piece.count(0) != len(piece):
            raise DataError(
                f"{where} goes on after its end marker at offset {at}: zeros were written into it, "
                "or tars were put one after the other; copy it again or write it anew"
            )


class _Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int


class _ReadAhead:
    """Small reads of a blob, at rising offsets."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self.size = blob.size
        self._start = 0
        self._data = b""

    def read(self, offset: int, size: int) -> bytes:
        """These bytes; ValueError if the blob ends before."""
        if offset + size > self.size:
            raise ValueError(f"needs {size} bytes, but the file ends at {self.size}: it was cut")
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            self._data = self._blob.read_at(offset, min(max(size, _AHEAD), self.size - offset))
            self._start = offset
        return self._data[offset - self._start :][:size]


def _check_beginning(ahead: _ReadAhead, where: str) -> None:
    if not ahead.size:
        raise DataError(f"{where} is empty; copy it again")
    block = ahead.read(0, min(BLOCK, ahead.size))
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic) and not _checksum_fits(block):
            raise DataError(f"{where} is compressed ({name}); decompress it, images do not shrink")
    if ahead.size % BLOCK:
        raise DataError(
            f"{where} has {ahead.size} bytes, no multiple of {BLOCK}: it was cut or is no tar; "
            "copy it again"
        )


def _next(ahead: _ReadAhead, at: int, where: str) -> tuple[_Header | None, int]:
    """The file or folder whose headers begin at `at`, and where its data begins.

    None, and where the end marker begins, when there is no further one.
    """
    given: list[bytes | None] = []  # by extended headers: the name of what comes behind them
    name = b""
    try:
        while any(block := ahead.read(at, BLOCK)):
            header = _parse(block)
            name = header.name
            if header.kind not in {_PAX, _PAX_GLOBAL, _LONG_NAME}:
                name = given[0] or name if given else name
                return _plain(header._replace(name=name)), at + BLOCK
            new_name = _read_extended(header, ahead, at + BLOCK)
            if header.kind != _PAX_GLOBAL:
                given.append(new_name)
            if len(given) > 1:
                raise ValueError("has two extended headers")
            at += BLOCK + _padded(header.size)
        if given:
            raise ValueError("is missing behind its extended header")
        if any(ahead.read(at, 2 * BLOCK)):
            raise ValueError("stands behind a block of zeros")
    except ValueError as error:
        raise _refusal(where, at, name, str(error)) from error
    return None, at


def _read_extended(header: _Header, ahead: _ReadAhead, at: int) -> bytes | None:
    """The name, if there is one, that an extended header gives to the member behind it."""
    if header.size > EXTENDED_LIMIT:
        raise ValueError(
            f"is an extended header of {header.size} bytes; the limit is {EXTENDED_LIMIT}"
        )
    content = ahead.read(at, header.size)
    name = (
        content.removesuffix(b"\0")
        if header.kind == _LONG_NAME
        else _read_pax(content, path=header.kind == _PAX)
    )
    if name == b"":
        raise ValueError("gives an empty name")
    return name


def _plain(header: _Header) -> _Header:
    """The header, if it is a file or a folder that can be taken as it is."""
    name, kind = header.name, header.kind
    if kind == _OLD_FILE:
        kind = _FOLDER if name.endswith(b"/") else _FILE
    if kind not in {_FILE, _FOLDER}:
        what = _REFUSED.get(kind, f"of type {kind!r}, which is no plain file")
        raise ValueError(f"is {what}")
    if kind == _FOLDER:
        if header.size:
            raise ValueError(f"is a folder that claims {header.size} bytes")
        name = name.removesuffix(b"/")
    if header.size >= MEMBER_LIMIT:
        raise ValueError(f"has {header.size} bytes; the limit is {MEMBER_LIMIT - 1}")
    if len(name) > NAME_LIMIT:
        raise ValueError(f"has a name of {len(name)} bytes; the limit is {NAME_LIMIT}")
    if b"\0" in name:
        raise ValueError("has a NUL byte in its name")
    try:
        name.decode()
    except UnicodeDecodeError as error:
        raise ValueError("has a name that is not UTF-8") from error
    parts = name.split(b"/")
    if not name or b"" in parts or b".." in parts or (kind == _FILE and parts[-1] == b"."):
        raise ValueError("has an empty, absolute or outward name")
    return header._replace(kind=kind)


def _parse(block: bytes) -> _Header:
    """Read a header block: POSIX's 'ustar Interchange Format', GNU's or v7's by the magic."""
    if not _checksum_fits(block):
        raise ValueError("has a wrong checksum, or no header stands there: damaged")
    name = _until_nul(block[:100])
    if block[257:263] == b"ustar\0":
        prefix = _until_nul(block[345:500])
        name = prefix + b"/" + name if prefix else name
    elif block[257:263] != b"ustar " and any(block[257:265]):  # neither GNU's nor v7's
        raise ValueError(f"is of an unknown tar format, magic {block[257:265]!r}")
    return _Header(block[156:157], name, _number(block[124:136]))


def _checksum_fits(block: bytes) -> bool:
    """The sum of all bytes as unsigned numbers, the checksum's own eight counted as spaces."""
    try:
        return _number(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _number(field: bytes) -> int:
    """Octal digits between spaces and NULs; or binary, as GNU tar writes what is too large."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b" \0").lstrip(b" ")
    if not re.fullmatch(rb"[0-7]+", digits):
        raise ValueError(f"has a header with {field!r} where a number should be")
    return int(digits, 8)


def _until_nul(field: bytes) -> bytes:
    text, _, rest = field.partition(b"\0")
    if any(rest):
        raise ValueError("has a NUL byte in its name")
    return text


def _read_pax(content: bytes, *, path: bool) -> bytes | None:
    r"""The path that a PAX header's records `LENGTH key=value\n` give, if they do and may."""
    values: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        match = re.compile(rb"([1-9]\d{0,4}) ([^=\n]+)=").match(content, at)
        end = at + int(match[1]) if match else at
        if not match or match.end() >= end or content[end - 1 : end] != b"\n":
            raise ValueError(f"has a damaged PAX record: {content[at : at + 40]!r}")
        key = match[2]
        if not (path and key == b"path") and not _HARMLESS.fullmatch(key):
            raise ValueError(f"has the PAX key {key[:40]!r}, which a plain file does not need")
        if key in values:
            raise ValueError(f"has the PAX key {key[:40]!r} twice")
        values[key] = content[match.end() : end - 1]
        at = end
    return values.get(b"path")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _refusal(where: str, at: int, name: bytes, what: str) -> DataError:
    shown = name[:200].decode(errors="backslashreplace")
    return DataError(
        f"{where}: member {shown!r} at offset {at} {what}; copy the tar again if it was damaged, "
        "or write it anew of plain files"
    )
