"""Images made anew while packing: smaller, or as a JPEG that the region decoder takes."""

import io
import warnings

from PIL import Image

from sharding.errors import BadImageError
from sharding.images import ImageFacts
from sharding.manifest import IMAGE_FORMATS, ImageRules

_PLAIN = frozenset(["JPEG", "JPEG grey"])


def convert(data: bytes, facts: ImageFacts, rules: ImageRules, where: str) -> bytes:
    """The bytes to be stored: the same, or a baseline JPEG where the rules ask for one.

    Grey stays grey, everything else becomes RGB as `Image.convert` makes it; what EXIF says of a
    rotation is ignored, as it is in training. Raises BadImageError if the image cannot be decoded.
    """
    size = _smaller(facts, rules.resize)
    if size is None and not (rules.transcode and facts.kind not in _PLAIN):
        return data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                if size is not None:  # decoded at twice the size or more, then antialiased
                    image.draft(None, (2 * size[0], 2 * size[1]))
                pixels = image.convert("L" if image.mode == "L" else "RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImageError(f"{where} cannot be decoded: {error}") from error
    if size is not None:
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    output = io.BytesIO()
    pixels.save(output, "JPEG", quality=rules.quality)
    return output.getvalue()


def _smaller(facts: ImageFacts, resize: int | None) -> tuple[int, int] | None:
    """Width and height with `resize` as the shorter side; None if it is not longer already."""
    shorter = min(facts.width, facts.height)
    if resize is None or shorter <= resize:
        return None
    return tuple(max(1, round(side * resize / shorter)) for side in (facts.width, facts.height))  # type: ignore[return-value]  # two of two
