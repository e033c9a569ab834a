"""One image file: what its first bytes say it is, and its size in pixels."""

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from sharding.errors import BadImageError
from sharding.manifest import IMAGE_FORMATS, MAX_PIXELS

# JPEG markers without a length: TEM and RST0-7. SOF0-15 but for DHT (C4), JPG (C8) and DAC (CC)
# carry the size (ITU T.81, table B.1).
_BARE = frozenset([0x01, *range(0xD0, 0xD8)])
_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """What an image's header says. Width and height are in pixels, EXIF rotation not applied."""

    format: str
    width: int
    height: int
    channels: int

    @property
    def kind(self) -> str:
        """The format, and how a JPEG's colours differ from the usual ones."""
        unusual = {1: " grey", 4: " CMYK"} if self.format == "JPEG" else {}
        return self.format + unusual.get(self.channels, "")


def check_header(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Read the header of a JPEG, PNG or WebP; the bytes decide, not the file's name.

    Raises BadImageError, naming `where`, when the bytes are none of these, or claim more pixels.
    """
    facts = _jpeg_facts(data) or _facts(data, where)
    if facts.width * facts.height > max_pixels:
        raise BadImageError(
            f"{where} has {facts.width} x {facts.height} pixels; the limit is {max_pixels}"
        )
    return facts


def check_pixels(data: bytes, where: str) -> None:
    """Decode the whole image. Raises BadImageError, naming `where`, if it is cut or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImageError(f"{where} cannot be decoded: {error}") from error


def _facts(data: bytes, where: str) -> ImageFacts:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                assert image.format is not None
                return ImageFacts(
                    format=image.format,
                    width=image.width,
                    height=image.height,
                    channels=len(image.getbands()),
                )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(
            f"{where} is no JPEG, PNG or WebP image ({len(data)} bytes, first {data[:8]!r}); "
            "repair or remove it"
        ) from error


def _jpeg_facts(data: bytes) -> ImageFacts | None:
    """What a JPEG's frame header says, None where it is not plainly one.

    Pillow says the same in 60 us; at a packer's speed that would be a third of its time.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAME:
            height, width = (
                int.from_bytes(data[at + 5 : at + 7], "big"),
                int.from_bytes(data[at + 7 : at + 9], "big"),
            )
            channels = data[at + 9]
            if not (width and height and channels):
                return None
            return ImageFacts(format="JPEG", width=width, height=height, channels=channels)
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _BARE:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
