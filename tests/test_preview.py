"""What a preview shows: the very crops that training gets, and from wherever the data is."""

from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

import shard
from loaders.augment import AugmentConfig
from loaders.preview import EPOCHS, look
from loaders.sizes import ProgressiveConfig, Sizes
from sharding.errors import DataError
from tests.fault_proxy import BUCKET, s3_endpoint
from tests.make_shards import (
    GLOBAL_BATCH,
    ORDER,
    SAMPLES,
    copy_of_shards,
    data_set,
    make_loader,
    open_shards,
)

AUGMENT = AugmentConfig(policy="randaugment", erase_probability=0.5)
GROWING = Sizes(
    size=24, progressive=ProgressiveConfig(start_size=16, start_epoch=3, end_epoch=4, multiple=8)
)


def test_crops_are_what_training_gets() -> None:
    """Policy, erasing and progressive sizes included; of samples of all kinds, in two epochs."""
    reader = open_shards()
    shown = look(
        reader, order=ORDER, augment=AUGMENT, sizes=GROWING, samples=GLOBAL_BATCH, epochs=[3, 4]
    )
    loader = make_loader(augment=AUGMENT, size=GROWING)
    loader.set_epoch(3)
    first = next(iter(loader))
    assert [one.key for one in shown] == [reader.key(n) for n in first.numbers.tolist()]
    assert [one.label for one in shown] == [reader.classes[n] for n in first.labels.tolist()]
    for one, pixels in zip(shown, first.images.numpy(), strict=True):
        assert np.array_equal(one.crops[0].pixels, pixels)
    loader.set_epoch(4)
    later = {
        reader.key(number): pixels
        for batch in loader
        for number, pixels in zip(batch.numbers.tolist(), batch.images.numpy(), strict=True)
    }
    seen_again = [one for one in shown if one.key in later]
    assert len(seen_again) > GLOBAL_BATCH // 2  # an epoch leaves 43 % 12 out
    for one in seen_again:
        assert one.crops[1].pixels.shape == (24, 24, 3)
        assert np.array_equal(one.crops[1].pixels, later[one.key])


def test_boxes_and_flips_are_those_of_the_crops() -> None:
    """What the box holds, resized and mirrored as it says, looks like the crop."""
    shown = look(
        open_shards(),
        order=ORDER,
        augment=AugmentConfig(crop_scale=(0.2, 0.5)),
        sizes=Sizes(size=16),
        samples=1000,
        epochs=[0],
    )
    assert len(shown) == SAMPLES["train"]  # all that there are
    assert {one.crops[0].mirrored for one in shown} == {True, False}
    for one in shown:
        (crop,) = one.crops
        cut = Image.fromarray(one.stored).resize((16, 16), box=crop.box)
        expected = np.asarray(cut)[:, ::-1] if crop.mirrored else np.asarray(cut)
        difference = np.abs(expected.astype(int) - crop.pixels).mean()
        other = np.abs(expected[:, ::-1].astype(int) - crop.pixels).mean()
        assert difference < 12
        assert difference < other


def test_damaged_bytes_are_named(tmp_path: Path) -> None:
    """The sample in words, not a picture of what the damage left."""
    root = copy_of_shards(tmp_path)
    for path in (root / "train").glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[600:700] = bytes(100)
        path.write_bytes(data)
    with pytest.raises(DataError, match="were changed or damaged"):
        look(
            open_shards(root),
            order=ORDER,
            augment=AUGMENT,
            sizes=GROWING,
            samples=1000,
            epochs=[0],
        )


def preview(destination: str | Path, picture: Path, *more: str) -> bytes:
    """The bytes of the PNG that the command makes."""
    assert shard.main(["preview", str(destination), str(picture), "--samples", "3", *more]) == 0
    return picture.read_bytes()


def test_the_command(
    tmp_path: Path, small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PNG, whatever its name; the same for the same seed; of the recipe's seed and size."""
    shards = data_set() / "shards"
    made = preview(shards, tmp_path / "new" / "sheet.png", "--recipe", str(small_recipe))
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        assert picture.format == "PNG"
        size = f"{picture.width} x {picture.height} pixels"
        assert picture.width > EPOCHS * 128  # the recipe's 8 pixels, enlarged
    assert capsys.readouterr().out == f"{tmp_path}/new/sheet.png: {size}\n"
    again = preview(shards, tmp_path / "again.png", "--recipe", str(small_recipe), "--seed", "0")
    assert made == again
    for option in ("--seed", "--epoch"):
        other = preview(shards, tmp_path / "o.png", "--recipe", str(small_recipe), option, "1")
        assert made != other


def test_the_command_reads_from_s3(
    tmp_path: Path, small_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same picture, but for the address in its title."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint())
    here = data_set() / "shards" / "train"
    there = f"s3://{BUCKET}/{uuid4().hex}"
    assert shard.main(["copy", str(here), there, "--workers", "1"]) == 0
    pictures = []
    for url in (here, there):
        preview(url, tmp_path / "sheet.png", "--recipe", str(small_recipe))
        with Image.open(tmp_path / "sheet.png") as picture:
            pictures.append(np.asarray(picture)[60:])
    assert np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", str(1 << 64)), "seed must be in"),
        (("--epoch", str((1 << 24) - 2)), "--epoch must be at most 16777211, got 16777214"),
        (("--recipe", "nothing.yaml"), "there is no recipe nothing.yaml"),
    ],
)
def test_wrong_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    """One line, status 2, no picture."""
    line = ["preview", str(data_set() / "shards"), str(tmp_path / "x.png"), *options]
    assert shard.main(line) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
