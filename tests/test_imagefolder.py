"""ImageFolder: the batches of the packed shards, without packing."""

import shutil
from pathlib import Path

import pytest

from loaders.imagefolder import FolderReader
from sharding.errors import DataError
from sharding.manifest import Packing
from sharding.source import scan
from tests.make_shards import (
    PACKING,
    assert_equal,
    copy_of_shards,
    data_set,
    global_batches,
    make_loader,
    open_images,
    open_shards,
    ranks,
)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 1)])
def test_batches_are_those_of_the_shards(world: int, workers: int) -> None:
    """Pixels, labels and sample numbers are bitwise those that the shards give, on any topology."""
    loaders = ranks(world, open_images(), workers=workers)
    expected = make_loader()
    for epoch in (0, 3):
        for loader in (*loaders, expected):
            loader.set_epoch(epoch)
        assert_equal(global_batches(loaders), list(expected))


def test_samples_are_those_of_the_shards() -> None:
    """Counts, classes, keys and bytes of all samples are what the packer would make."""
    folder, shards = open_images(), open_shards()
    assert (folder.counts, folder.classes) == (shards.counts, shards.classes)
    for number in range(sum(folder.counts)):
        assert folder.key(number) == shards.key(number)
        assert folder.read(number) == shards.read(number)


@pytest.mark.parametrize("change", ["removed", "longer", "emptied"])
def test_a_changed_file_is_named(tmp_path: Path, change: str) -> None:
    """A file that is not as it was listed is a DataError that names it; others can be read."""
    root = shutil.copytree(data_set() / "images", tmp_path / "images")
    reader = open_images(root)
    path = Path(reader.describe(5))
    match change:
        case "removed":
            path.unlink()
        case "longer":
            path.write_bytes(path.read_bytes() + b"\0")
        case _:
            path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"^{path}: has \d+ bytes, \d+ when it was listed"):
        reader.read(5)
    assert reader.read(6) == open_images().read(6)


def test_digest_is_of_listing_and_packing(tmp_path: Path) -> None:
    """A copy elsewhere has the same identity; other packing, names or sizes make another."""
    root = shutil.copytree(data_set() / "images", tmp_path / "images")
    digest = open_images().digest
    assert open_images(root).digest == digest != open_shards(copy_of_shards(tmp_path)).digest
    others = [open_images(packing=Packing(seed=seed, max_samples=7)).digest for seed in (4, 5)]
    path = root / "train/ant/ant_0.JPEG"
    path.write_bytes(path.read_bytes() + b"\0")
    others.append(open_images(root, PACKING).digest)
    path.rename(path.with_stem("ant_00"))
    others.append(open_images(root).digest)
    assert len({digest, *others}) == 5


def test_a_flat_folder_reads_as_a_sorted_one(tmp_path: Path) -> None:
    """Keys have the class that the labels say, bytes come from where they stand; one identity."""
    root = data_set() / "images/train"
    class_of = {}
    for path in root.glob("*/*"):
        class_of[path.name] = path.parent.name
        shutil.copyfile(path, tmp_path / path.name)
    flat, folders = FolderReader(scan(tmp_path, class_of=class_of), PACKING), open_images()
    assert (flat.digest, flat.counts, flat.classes) == (
        folders.digest,
        folders.counts,
        folders.classes,
    )
    for number in range(sum(flat.counts)):
        assert flat.key(number) == folders.key(number)
        assert flat.read(number) == folders.read(number)
    assert Path(flat.describe(0)).parent == tmp_path
