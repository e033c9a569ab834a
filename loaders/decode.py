"""One image's bytes and a crop box -> (size, size, 3) uint8 RGB."""

import importlib.metadata
import io
import math
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is ever decoded. Pillow knows many more formats, and each is a way in for hostile bytes."""

# Pillow warns at half and raises at the double of this: the sizes of a decompression bomb. The
# packer's counts tell what is in a data set; here a warning for each epoch and worker is noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DecodeError(Exception):
    """Raised when bytes cannot be decoded; the caller knows which sample they are."""


def decoder_name() -> str:
    """The decoder at work, for logs and for the loader's state."""
    try:
        return f"pillow-simd {importlib.metadata.version('pillow-simd')}"
    except importlib.metadata.PackageNotFoundError:
        return f"pillow {importlib.metadata.version('pillow')}"


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from error


def decode_into(
    out: npt.NDArray[np.uint8],
    data: bytes,
    *,
    box: tuple[float, float, float, float],
    flip: bool,
    exact: bool,
) -> None:
    """Decode, cut the box out, resize it (bilinear, antialiased) and write it to `out`.

    out: (height, width, 3). box: left, top, right, bottom in pixels of the image. `exact`: see
    Crops.exact. Raises DecodeError.
    """
    height, width = out.shape[:2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # corrupt EXIF, which ImageNet has
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if not exact:
                box = _reduce(image, box, width, height)
            image = image.convert("RGB")  # loads; a plain RGB image is not copied again
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from error
    if not exact:  # crop first, so that no pixel from outside the box shines in
        left, top = math.floor(box[0]), math.floor(box[1])
        image = image.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
        box = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    out[:] = pixels[:, ::-1] if flip else pixels


def _reduce(
    image: Image.Image, box: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float]:
    """Set a JPEG to decode at 1/2, 1/4 or 1/8 if the box still covers the output; scale the box."""
    covers = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    factor = next((f for f in (8, 4, 2) if f <= covers), 1)
    if factor == 1 or image.format != "JPEG":
        return box
    full_width, full_height = image.size
    image.draft("RGB", (full_width // factor, full_height // factor))
    # libjpeg rounds a reduced size up, so the last column may stand for fewer source pixels.
    assert image.size == (-(-full_width // factor), -(-full_height // factor))
    left, top, right, bottom = (edge / factor for edge in box)
    return left, top, right, bottom
