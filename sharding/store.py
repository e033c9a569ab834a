"""Where shards are kept: the Store protocol, and LocalStore for POSIX file systems."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from sharding.errors import DataError, UsageError

TEMPORARY_PREFIX = ".tmp-"
_PIECE = 16 << 20


class Blob(Protocol):
    """An open object that can be read at any place, from several threads and forks at once."""

    size: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises DataError where the object ends before."""
        ...


class Store(Protocol):
    """A flat folder of named objects. Names are plain file names, no paths."""

    url: str

    def sizes(self) -> dict[str, int]:
        """Name and size in bytes of every finished object; {} for a folder that is not there."""
        ...

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        ...

    def open(self, name: str, size: int | None = None) -> Blob:
        """The object, for ranged reads. Raises FileNotFoundError, at the latest when it is read.

        size: what it is known to have, which saves a remote store the request that asks for it.
        """
        ...

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A stream to write.

        The object appears whole, replacing one of the same name, when the block ends without an
        exception; otherwise nothing of it stays.
        """
        ...

    def duplicate(self, source: str, target: str) -> None:
        """Let `target` be what `source` is now, whatever becomes of `source`.

        Without its bytes leaving the store where that can be. `target` appears whole, replacing one
        of the same name, or stays as it was. Raises FileNotFoundError if there is no source.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove the object if it is there."""
        ...

    def sweep(self, ours: Callable[[str], bool] = ...) -> None:
        """Remove what killed writers left half-written. Only while nobody writes there.

        ours: whether what would have had this name may be removed; default: all.
        """
        ...


def local_path(text: str) -> Path:
    """A path as it was typed, with ~ for the home folder, also where no shell has seen to that."""
    return Path(os.path.expanduser(text) if text == "~" or text.startswith("~/") else text)


def local_place(url: str) -> Path | None:
    """What a path or a file:// URL names on this machine; None for a URL of elsewhere."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return local_path(url)
    return Path(rest) if scheme == "file" else None


def open_store(url: str) -> Store:
    """The store behind a path, a file:// or an s3:// URL."""
    path = local_place(url)
    if path is not None:
        return LocalStore(path)
    if url.startswith("s3://"):
        return _open_s3(url)
    raise UsageError(f"cannot open {url!r}: only local paths, file:// and s3:// URLs are supported")


def _open_s3(url: str) -> Store:
    try:
        from sharding.s3 import S3Store  # noqa: PLC0415  (boto3 is optional, and slow to import)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"boto3", "botocore"}:
            raise
        raise UsageError(
            f"cannot open {url!r}: boto3 is not installed; pip install 'shardstream[s3]'"
        ) from error
    return S3Store(url)


def locate(base: Store, url: str) -> tuple[Store, str]:
    """The store and the name of a shard's URL, which is relative to `base` or absolute."""
    folder, slash, name = url.rpartition("/")
    if not name or name in {".", ".."}:
        raise DataError(f"{url!r} is no name of a shard")
    if not slash:
        return base, name
    if not url.startswith("/") and "://" not in url:
        raise DataError(f"{url!r} is neither a name beside the manifest nor an absolute URL")
    return open_store(folder or "/"), name


def copy_bytes(store: Store, source: str, target: str) -> None:
    """Store.duplicate by reading and writing, for where there is no better way."""
    blob = store.open(source)
    with store.create(target) as stream:
        for at in range(0, blob.size, _PIECE):
            stream.write(blob.read_at(at, min(_PIECE, blob.size - at)))


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears whole, when the block ends well, or not at all.

    Temporary file in the same folder, fsync, rename, fsync of the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = os.fsdecode(os.fsencode(path.name)[:200])  # file names have up to 255 bytes
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{name}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)  # mkstemp's 0600 would hide it from colleagues
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say what it could not take
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class LocalBlob:
    """A file opened for reading at offsets; closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        """See Blob."""
        data = os.pread(self._descriptor, size, offset)
        if len(data) == size:
            return data
        pieces = [data]  # a signal or a network file system may cut a read short
        got = len(data)
        while got < size:
            data = os.pread(self._descriptor, size - got, offset + got)
            if not data:
                raise DataError(
                    f"{self._path} ends at byte {offset + got}, {size} bytes are needed from "
                    f"{offset}: the file was truncated"
                )
            pieces.append(data)
            got += len(data)
        return b"".join(pieces)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # AttributeError: the open failed
            os.close(self._descriptor)


class LocalStore:
    """A folder on a POSIX file system: a local disk, NFS or Lustre."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def sizes(self) -> dict[str, int]:
        """See Store."""
        try:
            with os.scandir(self.root) as entries:
                return {
                    e.name: e.stat().st_size
                    for e in entries
                    if e.is_file() and not e.name.startswith(".")
                }
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read(self, name: str) -> bytes:
        """See Store."""
        return (self.root / name).read_bytes()

    def open(self, name: str, size: int | None = None) -> Blob:
        """See Store."""
        return LocalBlob(self.root / name)

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """See Store."""
        return atomic_file(self.root / name)

    def duplicate(self, source: str, target: str) -> None:
        """See Store. A hard link, where the file system has them."""
        temporary = self.root / f"{TEMPORARY_PREFIX}{target}-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.root / source, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            copy_bytes(self, source, target)
            return
        try:
            os.replace(temporary, self.root / target)
        finally:  # the rename leaves it where both names are links to one file
            temporary.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """See Store."""
        (self.root / name).unlink(missing_ok=True)

    def sweep(self, ours: Callable[[str], bool] = lambda name: True) -> None:
        """See Store."""
        for leftover in self.root.glob(f"{TEMPORARY_PREFIX}*"):
            if ours(leftover.name.removeprefix(TEMPORARY_PREFIX).rpartition("-")[0]):
                leftover.unlink(missing_ok=True)
