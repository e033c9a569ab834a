"""The contact sheet: crops drawn pixel by pixel, frames where they belong, text that fits."""

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from loaders.sheet import Crop, Shown, sheet

GREEN, MAGENTA = (0, 255, 0), (255, 0, 255)


def solid(colour: tuple[int, int, int], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Pixels of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def bounds(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what has exactly this colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize(("size", "tile"), [(200, 200), (100, 100), (32, 128), (48, 96)])
def test_crops_stand_in_the_picture_unscaled_or_enlarged_whole(size: int, tile: int) -> None:
    """By the largest whole number that keeps them within 128 pixels, if they are smaller."""
    crop = Crop(0, solid(MAGENTA, size, size), (0.0, 0.0, 90.0, 90.0), mirrored=False)
    other = crop._replace(epoch=1, pixels=solid(GREEN, size, size))
    one = Shown("a", "a/1", solid((1, 2, 3), 90, 120), 1000, [crop, other])
    picture = sheet([one], title="t", notes=["n"])
    for colour in (MAGENTA, GREEN):
        left, top, right, bottom = bounds(picture, colour)
        assert (right - left, bottom - top) == (tile, tile)
        assert (np.asarray(picture)[top:bottom, left:right] == colour).all()
    assert bounds(picture, MAGENTA)[2] < bounds(picture, GREEN)[0]  # epoch 0 stands first


def test_each_crops_frame_stands_on_the_stored_image() -> None:
    """In the colour that surrounds its crop, at its place in the image, which fits its room."""
    crop = Crop(0, solid(MAGENTA, 150, 150), (100.0, 50.0, 300.0, 150.0), mirrored=True)
    one = Shown("a", "a/1", solid(GREEN, 200, 400), 1000, [crop])
    picture = sheet([one], title="t", notes=[])
    left, top, right, bottom = bounds(picture, GREEN)
    scale = (right - left) / 400
    assert (right - left, bottom - top) == (200, 100)  # 4/3 of a tile wide
    near = bounds(picture, MAGENTA)
    frame = picture.getpixel((near[0] - 1, near[1]))
    assert isinstance(frame, tuple)
    x0, y0, x1, y1 = bounds(picture.crop((left, top, right, bottom)), frame[:3])  # type: ignore[arg-type]
    assert (x0, y0, x1, y1) == (100 * scale, 50 * scale, 300 * scale, 150 * scale)


def test_long_names_do_not_widen_the_sheet() -> None:
    """They are cut; so are titles."""
    crop = Crop(0, solid(MAGENTA, 64, 64), (0.0, 0.0, 9.0, 9.0), mirrored=False)
    short, long = (
        sheet([Shown(text, text, solid(GREEN, 9, 9), 1, [crop])], title=text, notes=[text])
        for text in ("a", "网" * 150)
    )
    assert short.size == long.size
    margin = np.asarray(long)[:, -3:]
    assert (margin == margin[0, 0]).all()
