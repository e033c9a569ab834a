"""A contact sheet of samples, as they are stored and as training gets them.

    bee   bee/bee_7, 640 x 480 pixels, 51.2 kB
    +----------------+  +---------+  +---------+  +---------+
    |   stored, and  |  | epoch 0 |  | epoch 1 |  | epoch 2 |
    | the crops' box |  |         |  |         |  |         |
    +----------------+  +---------+  +---------+  +---------+
                         31%          9%, mirrored 74%

Small crops are enlarged by a whole number and others stand as they are, so each pixel is a pixel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from loaders.decode import Box

Pixels = npt.NDArray[np.uint8]

_COLOURS = ("#4e9de6", "#f28e2b", "#59b04f", "#e15759", "#b07ad0", "#17b3b9")  # an epoch each
_PAPER, _INK, _PALE = "#16181d", "#f2f2f2", "#9aa0aa"
_GAP, _LINE, _FRAME = 14, 22, 3  # pixels: between tiles, of a line of text, around a tile
_TITLE = 28  # pixels of its line
_LEAST_TILE = 128  # pixels of a side; smaller crops are enlarged


class Crop(NamedTuple):
    """What training is given of a sample in one epoch."""

    epoch: int
    pixels: Pixels
    """(size, size, 3)"""
    box: Box
    """Left, top, right, bottom in pixels of the stored image."""
    mirrored: bool


class Shown(NamedTuple):
    """A sample of the sheet."""

    label: str
    key: str
    stored: Pixels
    """(height, width, 3): the whole image."""
    stored_bytes: int
    crops: list[Crop]


class Layout(NamedTuple):
    """Where things stand, in pixels of the sheet."""

    lefts: list[int]
    """Of the stored image and of each crop."""
    wide: int
    """Room of the stored image."""
    tile: int
    """Room of a crop's side, and of the stored image's height."""
    zoom: int
    """How many pixels a crop's pixel is wide."""


def sheet(shown: Sequence[Shown], *, title: str, notes: Sequence[str]) -> Image.Image:
    """The picture; `notes` are lines below the title. Text that is too long is cut."""
    layout = _layout(shown)
    lefts, wide, tile, _ = layout
    row_height = _LINE + tile + _LINE + _GAP
    top = _GAP + _TITLE + _LINE * len(notes) + _GAP + _LINE
    size = (lefts[-1] + tile + _GAP, top + row_height * len(shown))
    picture = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(picture)
    _write(pen, (_GAP, _GAP), title, 18, _INK, room=size[0] - 2 * _GAP)
    for line, note in enumerate(notes):
        place = (_GAP, _GAP + _TITLE + line * _LINE)
        _write(pen, place, note, 13, _PALE, room=size[0] - 2 * _GAP)
    _write(pen, (_GAP, top - _LINE), "as stored", 13, _PALE, room=wide)
    for left, crop, colour in zip(lefts[1:], shown[0].crops, _colours(shown[0]), strict=True):
        _write(pen, (left, top - _LINE), f"epoch {crop.epoch}", 13, colour, room=tile)
    for row, one in enumerate(shown):
        _draw_row(picture, one, top + row * row_height, layout)
    return picture


def _layout(shown: Sequence[Shown]) -> Layout:
    largest = max(len(crop.pixels) for one in shown for crop in one.crops)
    zoom = max(_LEAST_TILE // largest, 1)
    tile = largest * zoom
    wide = tile * 4 // 3  # photographs are
    crops = range(len(shown[0].crops))
    return Layout([_GAP, *(2 * _GAP + wide + i * (tile + _GAP) for i in crops)], wide, tile, zoom)


def _draw_row(picture: Image.Image, one: Shown, top: int, layout: Layout) -> None:
    lefts, wide, tile, zoom = layout
    pen = ImageDraw.Draw(picture)
    height, width = one.stored.shape[:2]
    after = _write(pen, (lefts[0], top), one.label, 15, _INK, room=wide) + _GAP
    facts = f"{one.key}, {width} x {height} pixels, {one.stored_bytes / 1e3:,.1f} kB"
    _write(pen, (after, top + 1), facts, 13, _PALE, room=picture.width - after - _GAP)
    top += _LINE
    scale = min(wide / width, tile / height)
    small = (max(round(width * scale), 1), max(round(height * scale), 1))
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    picture.paste(Image.fromarray(one.stored).resize(small, resampling), (lefts[0], top))
    for left, crop, colour in zip(lefts[1:], one.crops, _colours(one), strict=True):
        x0, y0, x1, y1 = (edge * scale for edge in crop.box)
        frame = (lefts[0] + x0, top + y0, lefts[0] + x1 - 1, top + y1 - 1)
        pen.rectangle(frame, outline=colour, width=2)
        side = len(crop.pixels) * zoom
        around = (left - _FRAME, top - _FRAME, left + side + _FRAME - 1, top + side + _FRAME - 1)
        pen.rectangle(around, outline=colour, width=_FRAME)
        pixels = Image.fromarray(crop.pixels).resize((side, side), Image.Resampling.NEAREST)
        picture.paste(pixels, (left, top))
        share = (crop.box[2] - crop.box[0]) * (crop.box[3] - crop.box[1]) / (width * height)
        text = f"{share:.0%}{', mirrored' if crop.mirrored else ''}"
        _write(pen, (left, top + side + _FRAME), text, 13, _PALE, room=tile)


def _colours(one: Shown) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(one.crops))]


def _write(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    *,
    room: int,
) -> int:
    """Write one line, cut to `room` pixels; returns where it ends."""
    font = ImageFont.load_default(size)
    whole = text
    while text and pen.textlength(text, font) > room:
        text = f"{whole[: len(text) - 3]}.." if len(text) > 3 else ""
    pen.text(place, text, fill=colour, font=font)
    return place[0] + round(pen.textlength(text, font))
