"""Convert: what is made smaller or made a JPEG, and what stays as it is."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sharding.convert import convert
from sharding.errors import BadImageError
from sharding.images import check_header
from sharding.manifest import ImageRules
from tests.make_images import image


def converted(data: bytes, **rules: int | bool) -> bytes:
    """The image as these rules store it."""
    return convert(data, check_header(data, "x"), ImageRules(**rules), "x")  # type: ignore[arg-type]


def pixels(data: bytes) -> np.ndarray:
    """RGB as training decodes it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 100), st.sampled_from(["RGB", "L"]))
def test_the_shorter_side_shrinks_and_nothing_grows(
    width: int, height: int, resize: int, mode: str
) -> None:
    """The shorter side is at most `resize`, the shape stays; a small image keeps its bytes."""
    data = image(0, mode=mode, size=(width, height))
    small = converted(data, resize=resize)
    if min(width, height) <= resize:
        assert small is data
        return
    found = check_header(small, "x")
    assert min(found.width, found.height) == resize
    assert (
        abs(max(found.width, found.height) - max(width, height) * resize / min(width, height)) <= 1
    )
    assert found.kind == ("JPEG grey" if mode == "L" else "JPEG")


def test_a_smaller_image_is_an_antialiased_one() -> None:
    """Noise at a quarter of the size is nearly its mean: a resize that skips pixels stays noise."""
    data = image(0, "PNG", size=(400, 400))
    small = pixels(converted(data, resize=100, quality=100))
    assert pixels(data).std() > 70
    assert small.std() < 30


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("JPEG", "CMYK")],
)
def test_transcoding(kind: str, mode: str) -> None:
    """What the region decoder cannot take becomes a plain JPEG of nearly the same pixels."""
    smooth = Image.linear_gradient("L").resize((64, 48)).convert("RGB").convert(mode)
    buffer = io.BytesIO()
    smooth.save(buffer, kind)
    made = converted(buffer.getvalue(), transcode=True, quality=95)
    assert check_header(made, "x").kind == "JPEG"
    assert not Image.open(io.BytesIO(made)).info.get("progressive")
    assert abs(pixels(made) - pixels(buffer.getvalue())).mean() <= 3


@pytest.mark.parametrize("options", [{}, {"mode": "L"}, {"progressive": True}])
def test_plain_jpegs_keep_their_bytes(options: dict[str, str]) -> None:
    """Colour, grey and progressive JPEGs are not encoded a second time."""
    data = image(0, size=(50, 40), **options)
    assert converted(data, transcode=True, resize=40) is data


def test_quality_is_heeded() -> None:
    """A lower quality makes a smaller file."""
    data = image(0, "PNG", size=(90, 90))
    sizes = [len(converted(data, transcode=True, quality=quality)) for quality in (30, 90)]
    assert sizes[0] < sizes[1] / 2


def test_a_damaged_image_is_named() -> None:
    """What cannot be decoded cannot be converted."""
    data = image(0, "PNG", size=(90, 90))
    with pytest.raises(BadImageError, match=r"^x cannot be decoded: "):
        converted(data[: len(data) // 2], transcode=True)
