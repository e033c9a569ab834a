"""Deterministic tar members, and the names that samples have inside a tar.

A sample is its image under its own relative path and, right after it, its label as decimal text:

    n01440764/n01440764_10026.JPEG      the image's bytes as they are
    n01440764/n01440764_10026.cls       17

Plain POSIX ustar with mtime 0, owner 0 and mode 0644; a name that ustar cannot hold (longer than
100 bytes without a fitting prefix, or not ASCII) gets a PAX header, as every tar writes it.
"""

import re
from urllib.parse import unquote

BLOCK = 512
END = bytes(2 * BLOCK)

_NAME_BYTES = 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What stands behind a header's checksum: linkname, magic and version, owner names, devices, prefix.
_TAIL = (bytes(100) + b"ustar\x0000").ljust(BLOCK - 157, b"\0")


def member_name(path: str) -> tuple[str, str]:
    """Key and extension under which a file of this relative path stands in a tar.

    webdataset ends a key at the first dot of the file's name and skips names in double
    underscores. So a dot in the stem, `%` itself, a leading `__` and control characters (a line
    break hides a sample) are percent-encoded, and nothing else: `path_of` undoes it.
    """
    encoded = _CONTROL.sub(lambda match: f"%{ord(match[0]):02X}", path.replace("%", "%25"))
    folder, slash, name = encoded.rpartition("/")
    stem, _, extension = name.rpartition(".")
    return _guard(folder) + slash + _guard(stem.replace(".", "%2E")), extension


def path_of(member: str) -> str:
    """The relative path that a member's name was made of."""
    return unquote(member)


def _guard(name: str) -> str:
    return "%5F" + name[1:] if name.startswith("__") else name


def member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """A regular file: its header, its data and its padding, to be written one after the other."""
    return header(name, len(data)), data, bytes(-len(data) % BLOCK)


def header(name: str, size: int) -> bytes:
    """The header blocks of a regular file. Same name and size, same bytes."""
    encoded = name.encode()
    if len(encoded) <= _NAME_BYTES and name.isascii():
        return _block(encoded, size, b"0")
    record = _pax_record(b"path", encoded)
    plain = name.encode("ascii", "replace")[:_NAME_BYTES]
    return b"".join(
        [
            _block(b"././@PaxHeader", len(record), b"x"),
            record,
            bytes(-len(record) % BLOCK),
            _block(plain, size, b"0"),
        ]
    )


def _block(name: bytes, size: int, kind: bytes) -> bytes:
    """One ustar header block: mode 0644, owner and group 0, mtime 0."""
    if size >= 1 << 32:
        raise ValueError(f"{name!r} has {size} bytes; a sample's size must fit in 32 bits")
    before = b"%b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00" % (
        name.ljust(_NAME_BYTES, b"\0"),
        size,
    )
    # The checksum is the sum of all bytes, its own eight counted as spaces.
    checksum = sum(before) + sum(kind) + sum(_TAIL) + 8 * ord(" ")
    return b"%b%06o\x00 %b%b" % (before, checksum, kind, _TAIL)


def _pax_record(key: bytes, value: bytes) -> bytes:
    r"""`LENGTH key=value\n`, where LENGTH counts the whole record, its own digits included."""
    rest = b" %b=%b\n" % (key, value)
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%b" % (length, rest)
