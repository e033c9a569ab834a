"""Images: what a file's first bytes say."""

import itertools
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import BadImageError, DataError
from sharding.images import ImageFacts, check_header, check_pixels
from sharding.manifest import IMAGE_FORMATS
from tests.make_images import image

JPEG = image(0, size=(31, 17))
FRAME = JPEG.index(b"\xff\xc0")
PNG = image(0, "PNG")
HUGE = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + PNG[24:29]  # 3,600 megapixels


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.fixed_dictionaries(
        {
            "progressive": st.booleans(),
            "comment": st.binary(max_size=300),
            "restart_marker_blocks": st.integers(0, 4),
            "exif": st.just(b"Exif\x00\x00" + b"\xff\xc0" * 40),  # looks like frame headers
        }
    ),
)
def test_jpeg(size: tuple[int, int], mode: str, options: dict[str, Any]) -> None:
    """Every kind of JPEG that libjpeg writes has the size that it was made in."""
    found = check_header(image(0, mode=mode, size=size, **options), "x")
    assert found == ImageFacts(format="JPEG", width=size[0], height=size[1], channels=len(mode))


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_the_bytes_decide(kind: str) -> None:
    """The format is that of the bytes, whatever the file's name says (n02105855_2933.JPEG)."""
    found = check_header(image(0, kind, size=(31, 17)), "n02105855_2933.JPEG")
    assert found == ImageFacts(format=kind, width=31, height=17, channels=3)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (JPEG[:FRAME] + b"\xff\xff\xff" + JPEG[FRAME:], (31, 17)),  # fill bytes before a marker
        (JPEG[:FRAME] + b"\xff\x01" + JPEG[FRAME:], (31, 17)),  # a marker without a length
        (JPEG[:FRAME] + b"\xff\xc4\x00\x08tables" + JPEG[FRAME:], (31, 17)),  # no frame
        (JPEG[: FRAME + 10], (31, 17)),  # nothing is read behind the frame header
        (JPEG[: FRAME + 5] + b"\xff\xdc\xff\xdd" + JPEG[FRAME + 9 :], (65501, 65500)),  # a bomb
    ],
    ids=["fill bytes", "bare marker", "tables first", "only header", "4,290 megapixels"],
)
def test_odd_jpegs(data: bytes, size: tuple[int, int]) -> None:
    """Odd but legal headers are read, and nothing is decoded for it."""
    found = check_header(data, "x", max_pixels=1 << 33)
    assert (found.width, found.height) == size


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"a" * 1000,
        JPEG[: FRAME + 7],
        JPEG[: FRAME + 5] + bytes(4) + JPEG[FRAME + 9 :],  # 0 x 0 pixels
        image(0, "GIF"),
        PNG[:20],
        image(0, "WEBP")[:20],
        PNG[:12] + HUGE + zlib.crc32(HUGE).to_bytes(4, "big") + PNG[33:],
        b"GIF89a" + JPEG,
    ],
    ids=itertools.count(),
)
def test_what_is_no_image(data: bytes) -> None:
    """What is no JPEG, PNG or WebP is refused with its name, size and first bytes."""
    with pytest.raises(DataError, match=rf"^a/b\.jpg is no JPEG.*\({len(data)} bytes, first b"):
        check_header(data, "a/b.jpg")


def test_a_bomb_is_refused_by_its_header() -> None:
    """The limit holds for the pixels that a header claims, to the pixel."""
    assert check_header(JPEG, "x", max_pixels=31 * 17).width == 31
    with pytest.raises(BadImageError, match=r"^x has 31 x 17 pixels; the limit is 526$"):
        check_header(JPEG, "x", max_pixels=31 * 17 - 1)


@pytest.mark.parametrize(
    ("kind", "mode", "found"),
    [
        ("JPEG", "RGB", "JPEG"),
        ("JPEG", "L", "JPEG grey"),
        ("JPEG", "CMYK", "JPEG CMYK"),
        ("PNG", "RGB", "PNG"),
        ("PNG", "RGBA", "PNG"),
        ("WEBP", "RGB", "WEBP"),
    ],
)
def test_kinds(kind: str, mode: str, found: str) -> None:
    """What is counted of an image; the colours of a JPEG decide who can decode it."""
    assert check_header(image(0, kind, mode=mode), "x").kind == found


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damage_behind_the_header_needs_decoding(kind: str) -> None:
    """A cut image has a whole header; decoding it finds the cut."""
    whole = image(0, kind, size=(200, 100))
    cut = whole[: len(whole) // 2]
    check_pixels(whole, "x")
    assert check_header(cut, "x").width == 200
    with pytest.raises(BadImageError, match=r"^a/x\.jpg cannot be decoded: "):
        check_pixels(cut, "a/x.jpg")


@settings(deadline=None)
@given(
    st.sampled_from(IMAGE_FORMATS),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
    st.integers(0, 400),
)
def test_damaged_headers(kind: str, changes: list[tuple[int, int]], length: int) -> None:
    """Any damage to an image's first bytes gives a size or a DataError, never another exception."""
    data = bytearray(image(0, kind))
    for at, byte in changes:
        data[at] = byte
    try:
        found = check_header(bytes(data[:length]), "x")
    except DataError:
        return
    assert min(found.width, found.height) >= 1
