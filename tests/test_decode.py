"""Decode: what torchvision would make of the same bytes, or a clear error."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import resized_crop

from loaders.augment import centre_crops
from loaders.decode import (
    DecodeError,
    decode_by_pillow,
    decoder_name,
    get_decoder,
    image_size,
)
from tests.make_shards import encode, picture

Box = tuple[float, float, float, float]
Pixels = npt.NDArray[np.int64]


def decode(
    data: bytes, box: Box, width: int, height: int, *, exact: bool = False, flip: bool = False
) -> Pixels:
    """Decode into a fresh array; signed, so that differences can be taken."""
    out = np.empty((height, width, 3), np.uint8)
    decode_by_pillow(out, data, box, flip, exact)
    return out.astype(np.int64)


def differences(width: int, height: int, resize: int, size: int) -> Pixels:
    """Evaluation's pixels less torchvision's."""
    image = picture(width, width, height)
    sizes = np.array([width]), np.array([height])
    (box,) = centre_crops(*sizes, resize=resize, size=size).boxes.tolist()
    expected = Compose([Resize(resize), CenterCrop(size)])(image)
    found = decode(encode(image, "PNG", compress_level=1), box, size, size, exact=True)
    difference: Pixels = np.abs(found - np.asarray(expected))
    return difference


@pytest.mark.parametrize(
    ("width", "height"),
    [(500, 375), (375, 500), (256, 256), (257, 300), (640, 427), (224, 301), (61, 83), (401, 1024)],
)
def test_evaluation_is_torchvisions(width: int, height: int) -> None:
    """Resize(256) and CenterCrop(224) to the level; three of a thousand may be one off."""
    difference = differences(width, height, 256, 224)
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.003


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 48), st.data())
def test_evaluation_of_any_size(width: int, height: int, resize: int, data: st.DataObject) -> None:
    """The same for odd and tiny images; stretched ones may be off by two, one level a direction."""
    assert differences(width, height, resize, data.draw(st.integers(1, resize))).max() <= 2


@pytest.mark.parametrize(
    ("kind", "side"),
    [
        ("PNG", 40),  # no reduced scales
        ("JPEG", 101),  # 200 / 101 < 2
        ("JPEG", 300),  # enlarged
    ],
)
def test_training_crops_then_resizes(kind: str, side: int) -> None:
    """Where no reduced scale covers the output: the box is cut out, then resized, to the bit."""
    data = encode(picture(1, 300, 250), kind)
    box = (20, 30, 220, 230)
    with Image.open(io.BytesIO(data)) as image:
        expected = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
    assert np.array_equal(decode(data, box, side, side), np.asarray(expected))


@pytest.mark.parametrize(("side", "factor"), [(100, 2), (60, 2), (50, 4), (26, 4), (25, 8), (3, 8)])
def test_training_decodes_at_a_reduced_scale(side: int, factor: int) -> None:
    """The smallest of 1/2, 1/4, 1/8 that covers the output is taken, and looks like the whole."""
    data = encode(picture(2, 301, 251), quality=95)
    box = (24, 32, 224, 232)
    with Image.open(io.BytesIO(data)) as whole, Image.open(io.BytesIO(data)) as reduced:
        reduced.draft("RGB", (301 // factor, 251 // factor))
        assert reduced.size == (-(-301 // factor), -(-251 // factor))
        left, top, right, bottom = (edge // factor for edge in box)
        part = reduced.crop((left, top, right, bottom))
        scaled = part.resize((side, side), Image.Resampling.BILINEAR)
        unscaled = whole.crop(box).resize((side, side), Image.Resampling.BILINEAR)
    found = decode(data, box, side, side)
    assert np.array_equal(found, np.asarray(scaled))
    assert 0 < np.abs(found - np.asarray(unscaled)).mean() < 5


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("width", "height"), [(640, 480), (320, 240), (160, 120), (80, 60), (97, 53), (7, 9)]
)
def test_box_is_in_place(width: int, height: int, exact: bool) -> None:
    """Edges of the picture land where the box puts them, at every scale."""
    pixels = np.zeros((803, 1001, 3), np.uint8)
    pixels[160 + 360 :, :, 0] = 255  # red from 3/4 of the box's height on
    pixels[:, 200 + 160 :, 1] = 255  # green from 1/4 of its width on
    data = encode(Image.fromarray(pixels), quality=95, subsampling=0)
    found = decode(data, (200, 160, 840, 640), width, height, exact=exact)
    dark = 1 - found.mean(axis=(0, 1)) / 255
    assert dark[0] * height == pytest.approx(0.75 * height, abs=0.2)
    assert dark[1] * width == pytest.approx(0.25 * width, abs=0.2)
    assert dark[2] > 0.98


@pytest.mark.parametrize("exact", [False, True])
def test_flip(exact: bool) -> None:
    """A flipped image is the mirror of the one that is not, left and right."""
    data = encode(picture(3, 200, 150))
    plain, flipped = (
        decode(data, (10, 20, 190, 140), 24, 20, exact=exact, flip=flip) for flip in (False, True)
    )
    assert np.array_equal(flipped, plain[:, ::-1])
    assert not np.array_equal(flipped, plain)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"quality": 98, "subsampling": 0}),
        ("RGB", "JPEG", {"quality": 98, "subsampling": 0, "progressive": True}),
        ("CMYK", "JPEG", {"quality": 98}),  # 22 of ImageNet
        ("L", "JPEG", {"quality": 98}),  # 2% of ImageNet
        ("RGB", "PNG", {}),  # one of ImageNet, named .JPEG: the bytes decide
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": bytes(range(9))}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", {"quality": 99}),  # always with halved colours
    ],
)
def test_kinds_of_images(mode: str, kind: str, options: dict[str, Any], exact: bool) -> None:
    """Every kind of image comes out as RGB of the same colours; transparency is dropped."""
    image = picture(4, 60, 44).convert(mode)
    data = encode(image, kind, **options)
    assert image_size(data) == (60, 44)
    found = decode(data, (0, 0, 60, 44), 60, 44, exact=exact)
    assert np.abs(found - np.asarray(image.convert("RGB"))).mean() < 4


def big_png(width: int, height: int) -> bytes:
    """A PNG whose header says this size; there are no pixels behind it."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    return header + struct.pack(">I", zlib.crc32(chunk)) + encode(picture(5, 9, 9), "PNG")[33:]


JPEG = encode(picture(6, 120, 90))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 4096,
        b"<html>404 Not Found</html>",
        JPEG[:300],  # in the header
        big_png(30_000, 30_000),  # 900 megapixels: a decompression bomb
        encode(picture(6, 120, 90), "GIF"),  # formats that are never decoded
        encode(picture(6, 120, 90), "BMP"),
        encode(picture(6, 120, 90), "TIFF"),
        encode(picture(6, 120, 90), "PPM"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    """Bytes that are no JPEG, PNG or WebP raise DecodeError in both functions."""
    with pytest.raises(DecodeError):
        image_size(data)
    with pytest.raises(DecodeError):
        decode(data, (0, 0, 100, 90), 8, 8)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        JPEG[: len(JPEG) // 2],
        JPEG[: len(JPEG) - 100],
        encode(picture(6, 120, 90), "PNG")[:3000],
        encode(picture(6, 120, 90), "WEBP")[:800],
        big_png(120, 90),
    ],
)
def test_truncated_pixels_are_refused(data: bytes, exact: bool) -> None:
    """An image that ends early raises DecodeError: no grey half ever reaches training."""
    with pytest.raises(DecodeError):
        decode(data, (0, 0, 120, 90), 8, 8, exact=exact)


def test_decoder_name() -> None:
    """The name in checkpoints is of the Pillow that is imported, with its version."""
    assert decoder_name("pillow") in {f"pillow {PIL.__version__}", f"pillow-simd {PIL.__version__}"}


# Pillow-SIMD's resize rounds its weights to 16 bits, so it is not Pillow's to the bit.
RESIZE_LEVELS = 2 if ".post" in PIL.__version__ else 0
BY_REGION = get_decoder("region") if "region" in decoder_name() else None
built = pytest.mark.skipif(BY_REGION is None, reason="the region decoder is not built")


def by_both(data: bytes, box: Box, *, exact: bool, flip: bool = False) -> tuple[Pixels, Pixels]:
    """The same crop to 48 x 48 by the region decoder and by Pillow."""
    assert BY_REGION is not None
    found = []
    for decoder in (BY_REGION, get_decoder("pillow")):
        out = np.empty((48, 48, 3), np.uint8)
        decoder(out, data, box, flip, exact)
        found.append(out.astype(np.int64))
    return found[0], found[1]


@built
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),  # these go to Pillow
        ("P", "PNG", {}),
        ("RGB", "WEBP", {"quality": 80}),
    ],
)
@pytest.mark.parametrize("box", [(0, 0, 301, 203), (13, 7, 290, 199), (20, 30, 60, 50)])
def test_both_decoders_agree(
    mode: str, kind: str, options: dict[str, Any], box: Box, exact: bool
) -> None:
    """The same pixels as Pillow's, whichever the format; only the resize may round otherwise."""
    data = encode(picture(4, 301, 203).convert(mode), kind, **options)
    region, pillow = by_both(data, box, exact=exact, flip=True)
    allowed = RESIZE_LEVELS + exact  # exact: box relative to a part, so 32-bit floats round anew
    assert np.abs(region - pillow).max() <= allowed


@built
@settings(deadline=None, max_examples=40)
@given(st.integers(48, 95), st.integers(48, 95), st.integers(0, 60), st.integers(0, 60))
def test_training_crops_are_torchvisions(width: int, height: int, left: int, top: int) -> None:
    """RandomResizedCrop of the same box, where no reduced scale is used, to one level."""
    image = picture(5, 160, 160)
    data = encode(image, quality=90)
    with Image.open(io.BytesIO(data)) as decoded:
        expected = resized_crop(decoded, top, left, height, width, [48, 48], antialias=True)
    region, _ = by_both(data, (left, top, left + width, top + height), exact=False)
    assert np.abs(region - np.asarray(expected).astype(np.int64)).max() <= max(1, RESIZE_LEVELS)


@built
@pytest.mark.parametrize("cut", [3, 200, 0.5, 0.99])
def test_a_truncated_jpeg_is_an_error_for_both(cut: float) -> None:
    """What the region decoder calls corrupt Pillow decides, and Pillow refuses it."""
    data = encode(picture(6, 200, 150))
    part = data[: int(cut if cut > 1 else cut * len(data))]
    for decoder in (BY_REGION, get_decoder("pillow")):
        assert decoder is not None
        with pytest.raises(DecodeError):
            decoder(np.empty((8, 8, 3), np.uint8), part, (0, 0, 200, 150), False, False)


def test_an_unknown_decoder_is_refused() -> None:
    """The error lists what there is."""
    with pytest.raises(ValueError, match="one of auto, region, pillow, got 'turbo'"):
        get_decoder("turbo")


def test_without_the_extension_auto_is_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there was no compiler: auto decodes with Pillow, region says what it needs."""
    monkeypatch.setattr("loaders.decode._jpeg", None)
    assert get_decoder("auto") is decode_by_pillow
    assert decoder_name().startswith("pillow")
    with pytest.raises(ValueError, match="apt-get install gcc libjpeg-dev"):
        get_decoder("region")


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 257)])
def test_bicubic_evaluation_is_torchvisions(width: int, height: int) -> None:
    """Resize(236, bicubic) and CenterCrop(224), as recipes with a crop fraction of 0.95 test."""
    data = encode(picture(1, width, height))
    crops = centre_crops(np.array([width]), np.array([height]), resize=236, size=224)
    ours = np.empty((224, 224, 3), np.uint8)
    get_decoder("auto", "bicubic")(ours, data, tuple(crops.boxes[0]), False, crops.exact)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    theirs = np.asarray(
        Compose([Resize(236, InterpolationMode.BICUBIC), CenterCrop(224)])(image)
    ).astype(int)
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 2
    assert difference.mean() < 0.1
    with pytest.raises(ValueError, match="interpolation must be one of bilinear, bicubic, got 'la"):
        get_decoder("auto", "lanczos")
