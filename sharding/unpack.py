"""Unpacks shards into a folder again: the images under their own names, byte for byte.

All is written into a hidden folder beside the target, which takes the target's name when it is
complete. So an unpacking that was killed never looks complete; the same command starts over.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sharding.dataset import PackedSplit
from sharding.errors import DataError, UsageError
from sharding.manifest import Shard
from sharding.process import worker_pool
from sharding.tar import path_of
from sharding.tarscan import scan

Progress = Callable[[Shard], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackTask:
    """All that is needed to unpack one shard, in whichever process."""

    split: PackedSplit
    number: int
    folder: Path
    encoded: bool
    by_class: bool


def unpack(
    split: PackedSplit,
    folder: Path,
    *,
    workers: int,
    encoded: bool = True,
    by_class: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """Write every image of the split below `folder`; `progress` is told each shard.

    `encoded`: names are as our packer writes them; those of adopted shards stay as they are.
    `by_class`: each image is put below the folder of its class, so that an ImageFolder is made of
    shards whose names do not begin with the class. Files that are no sample's image are left out.

    Raises UsageError when the folder is not empty or another process unpacks into it, DataError
    for bytes that are not what the index says, and for names that lead out of the folder or that
    cannot stand beside each other in one.
    """
    with _completed(folder) as temporary:
        tasks = [
            UnpackTask(
                split=split, number=number, folder=temporary, encoded=encoded, by_class=by_class
            )
            for number in range(len(split.manifest.shards))
        ]
        with worker_pool(min(workers, len(tasks))) as pool:
            for shard in pool.map(unpack_shard, tasks):
                progress(shard)


def unpack_shard(task: UnpackTask) -> Shard:
    """Write the images of one shard, in the order in which they stand."""
    split, number = task.split, task.number
    where = split.where(number)
    index = split.read_index(number)
    blob = split.open_tar(number)
    row = 0
    for member in scan(blob, where):
        if row == len(index) or member.offset != index.table["offset"][row]:
            continue  # a label, or another file
        _, size, label, xxh3 = index.table[row].tolist()[:4]
        place = f"{where}: member {member.name!r} at offset {member.offset}"
        if member.size != size or not member.name.startswith(f"{index.key(row)}."):
            raise DataError(
                f"{place} has {member.size} bytes, the index says {size} of the sample "
                f"{index.key(row)!r}: its header was changed; copy the shard again"
            )
        data = blob.read_at(member.offset, size)
        if xxhash.xxh3_64_intdigest(data) != xxh3:
            raise DataError(f"{place} has wrong bytes; copy the shard again")
        path = path_of(member.name) if task.encoded else member.name
        parts = _parts(path, place)
        if task.by_class:
            name = split.manifest.classes[label]
            if len(_parts(name, f"the manifest of {where}")) != 1:
                raise DataError(f"{place} is of the class {name!r}, which can name no folder")
            parts = parts if parts[0] == name and len(parts) > 1 else [name, *parts]
        _write(task.folder.joinpath(*parts), data, place)
        row += 1
    if row < len(index):
        raise DataError(
            f"{where} has no member for the sample {index.key(row)!r}, which the index has at "
            f"offset {index.table['offset'][row]}; copy the shard again"
        )
    return split.manifest.shards[number]


def _parts(path: str, place: str) -> list[str]:
    """The parts of a path below a folder. Raises DataError for one that could lead out of it."""
    parts = [part for part in path.split("/") if part != "."]
    if not parts or "" in parts or ".." in parts or "\0" in path:
        raise DataError(f"{place} would be written to {path!r}, which is no path below a folder")
    return parts


def _write(path: Path, data: bytes, place: str) -> None:
    """Write a file that must not exist; the folders above are ours, so there is no link in them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as stream:
            stream.write(data)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(
            f"{place} cannot be written: another sample's file or folder has the name "
            f"{error.filename!r}"
        ) from error


@contextmanager
def _completed(folder: Path) -> Iterator[Path]:
    """A new, hidden folder that becomes `folder` when the block ends well, or goes away."""
    target = folder.resolve()
    temporary = target.parent / f".{target.name}.unpacking"
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_below(temporary)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            temporary.rmdir()
            raise UsageError(f"{folder} is not an empty folder; choose another one")
        try:
            yield temporary
            os.sync()  # a power cut must not leave the new name without the files
            os.rename(temporary, target)  # an empty target is replaced
        except BaseException:
            shutil.rmtree(temporary)
            raise
    except BlockingIOError as error:
        raise UsageError(f"another process is unpacking into {folder}") from error
    finally:
        os.close(lock)


def _remove_below(folder: Path) -> None:
    """Remove what a killed unpacking left."""
    for leftover in folder.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
