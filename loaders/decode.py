"""One image's bytes and a crop box -> (height, width, 3) uint8 RGB.

    region    decodes only the box of a JPEG, at the smallest DCT scale that covers the output, and
              resizes as rows come out of libjpeg-turbo (loaders/_jpeg.c, which is optional)
    pillow    decodes the whole image at that scale, crops, resizes; takes every format

The region decoder gives what it cannot take (PNG, WebP, CMYK, 12 bits, damaged files) to Pillow, so
what can be decoded, and what is an error, is the same for both.
"""

import io
import math
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from sharding.manifest import IMAGE_FORMATS

try:
    from loaders import _jpeg
except ImportError:  # built without a compiler or without libjpeg-turbo's headers
    _jpeg = None  # type: ignore[assignment]  # a module elsewhere

DECODERS = ("auto", "region", "pillow")
INTERPOLATIONS = ("bilinear", "bicubic")

Box = tuple[float, float, float, float]
DecodeInto = Callable[[npt.NDArray[np.uint8], bytes, Box, bool, bool], None]
"""(out, data, box, flip, exact): decode, cut the box out, resize it, write it to out.

out: (height, width, 3), C-contiguous. box: left, top, right, bottom in pixels of the image. flip:
mirror left and right. exact: see Crops.exact. The resize is bilinear and antialiased. Raises
DecodeError.
"""

# Pillow warns at half and raises at the double of a size that is called a bomb. The packer reports
# what is in a data set; here a warning for each epoch and worker would be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DecodeError(Exception):
    """Raised when bytes cannot be decoded; the caller knows which sample they are."""


def get_decoder(name: str, interpolation: str = "bilinear") -> DecodeInto:
    """The decoder of this name; 'auto' is the region decoder if it was built, else Pillow.

    Bicubic interpolation is Pillow's, whichever decoder is asked for. Raises ValueError for an
    unknown name, and for 'region' where it was not built.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}"
        )
    if interpolation != "bilinear":
        return partial(decode_by_pillow, resampling=Image.Resampling[interpolation.upper()])
    if name == "pillow" or (name == "auto" and _jpeg is None):
        return decode_by_pillow
    if name not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {name!r}")
    if _jpeg is None:
        raise ValueError(
            "decoder 'region' was not built: it needs a C compiler and the headers of "
            "libjpeg-turbo (Debian: apt-get install gcc libjpeg-dev) when shardstream is installed"
        )
    return decode_by_region


def decoder_name(name: str = "auto") -> str:
    """What is behind a decoder's name, with versions: for logs and for the loader's state."""
    if get_decoder(name) is decode_by_region:
        return f"region decoder on libjpeg-turbo {_jpeg.LIBJPEG_TURBO_VERSION}"
    # What is imported, not what is installed: Pillow-SIMD's releases end in .post0.
    return f"pillow{'-simd' if '.post' in PIL.__version__ else ''} {PIL.__version__}"


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the system's, that lets Pillow open no file of its own
        raise DecodeError(str(error)) from error


def decode_by_region(
    out: npt.NDArray[np.uint8], data: bytes, box: Box, flip: bool, exact: bool
) -> None:
    """See DecodeInto."""
    height, width = out.shape[:2]
    factor = 1 if exact else _reduction(box, width, height)
    scaled = _scaled(box, factor)
    try:
        region = _with_support(box, data, width, height) if exact else _around(scaled)
        _jpeg.decode_resized(data, *scaled, *region, factor, out, flip)
    except _jpeg.LimitError as error:
        raise DecodeError(str(error)) from error
    except (_jpeg.UnsupportedError, _jpeg.CorruptError):
        decode_by_pillow(out, data, box, flip, exact)


def decode_by_pillow(  # noqa: PLR0917 (DecodeInto, and one more)
    out: npt.NDArray[np.uint8],
    data: bytes,
    box: Box,
    flip: bool,
    exact: bool,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> None:
    """See DecodeInto."""
    height, width = out.shape[:2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # corrupt EXIF, which ImageNet has
            image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            factor = 1 if exact or image.format != "JPEG" else _reduction(box, width, height)
            if factor > 1:
                image.draft("RGB", (image.width // factor, image.height // factor))
                box = _scaled(box, factor)
            image = image.convert("RGB")  # loads; a plain RGB image is not copied again
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the system's, that lets Pillow open no file of its own
        raise DecodeError(str(error)) from error
    if not exact:  # crop first, so that no pixel from outside the box shines in
        region = _around(box)
        image = image.crop(region)
        box = (box[0] - region[0], box[1] - region[1], box[2] - region[0], box[3] - region[1])
    image = image.resize((width, height), resampling, box=box)
    pixels = np.asarray(image)
    out[:] = pixels[:, ::-1] if flip else pixels


def _reduction(box: Box, width: int, height: int) -> int:
    """The largest of 8, 4, 2 and 1 by which the box can shrink and still cover the output."""
    covers = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    return next((factor for factor in (8, 4, 2) if factor <= covers), 1)


def _scaled(box: Box, factor: int) -> Box:
    """The box in an image that is `factor` times smaller; exact for powers of two."""
    return box[0] / factor, box[1] / factor, box[2] / factor, box[3] / factor


def _around(box: Box) -> tuple[int, int, int, int]:
    """The whole pixels that the box touches."""
    return math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])


def _with_support(box: Box, data: bytes, width: int, height: int) -> tuple[int, int, int, int]:
    """The pixels that an antialiased bilinear resize of the box looks at, inside the image."""
    image_width, image_height = _jpeg.read_header(data)[:2]
    across = math.ceil(max((box[2] - box[0]) / width, 1)) + 1
    down = math.ceil(max((box[3] - box[1]) / height, 1)) + 1
    left, top, right, bottom = _around(box)
    return (
        max(left - across, 0),
        max(top - down, 0),
        min(right + across, image_width),
        min(bottom + down, image_height),
    )
