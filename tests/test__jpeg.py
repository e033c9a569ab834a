"""loaders._jpeg: the same pixels as Pillow, and an error for everything that is broken."""

import gc
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from tests.make_jpegs import (
    KINDS,
    Spec,
    find_marker,
    keep_scans,
    make_jpeg,
    make_scans_apart,
    patch_frame,
)

_jpeg = pytest.importorskip("loaders._jpeg")

DENOMS = (1, 2, 4, 8)

libjpeg_turbo = pytest.mark.skipif(
    not features.check("libjpeg_turbo"),
    reason="Pillow is built on another libjpeg than libjpeg-turbo",
)
same_version = pytest.mark.skipif(
    features.version("libjpeg_turbo") != _jpeg.LIBJPEG_TURBO_VERSION,
    reason="versions of libjpeg-turbo smooth differently",
)


def decode_whole(data: bytes, denom: int) -> Image.Image:
    """Decode with Pillow at scale 1/denom, as draft() does, also images too small for it."""
    image = Image.open(io.BytesIO(data))
    size = (-(-image.width // denom), -(-image.height // denom))
    codec, _, offset, arguments = image.tile[0]
    image.tile = [ImageFile._Tile(codec, (0, 0, *size), offset, arguments)]
    image._size = size
    image.decoderconfig = (denom, 0)
    return image.convert("RGB")


def check_regions(data: bytes, denom: int, regions: list[tuple[int, int, int, int]]) -> None:
    """Compare regions with the crops of a full decode."""
    whole = decode_whole(data, denom)
    for region in regions:
        assert _jpeg.decode_region(data, *region, denom) == whole.crop(region).tobytes(), (
            region,
            denom,
        )


@st.composite
def spans(draw: st.DrawFn, length: int) -> tuple[int, int]:
    """A part [first, last) of 0..length-1 that is not empty."""
    first = draw(st.integers(0, length - 1))
    return first, draw(st.integers(first + 1, length))


specs = st.builds(
    Spec,
    width=st.integers(1, 130),
    height=st.integers(1, 130),
    kind=st.sampled_from(KINDS),
    progressive=st.booleans(),
    quality=st.sampled_from((5, 60, 90, 100)),
    restart_blocks=st.sampled_from((0, 1, 3)),
)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_read_header_reports_size_components_and_mode(kind: str, progressive: bool) -> None:
    """The header is that of the file, for every kind."""
    data = make_jpeg(Spec(width=37, height=53, kind=kind, progressive=progressive))
    width, height, components, is_progressive = _jpeg.read_header(data)
    assert (width, height) == Image.open(io.BytesIO(data)).size
    assert components == (1 if kind == "grey" else 3)
    assert is_progressive is progressive


@libjpeg_turbo
@pytest.mark.parametrize("denom", DENOMS)
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_region_equals_the_crop_of_a_full_decode(kind: str, progressive: bool, denom: int) -> None:
    """Regions at every edge, alignment and size are bit-identical to Pillow's decode and crop."""
    data = make_jpeg(Spec(width=131, height=117, kind=kind, progressive=progressive))
    width, height = decode_whole(data, denom).size
    starts_x, starts_y = (
        {0, 1, 7, 8, 15, 16, 17, 33, width - 1},
        {0, 1, 2, 8, 15, 16, 17, 31, 32, 50, height - 1},
    )
    regions = [
        (x, y, min(x + w, width), min(y + h, height))
        for x in starts_x
        for y in starts_y
        for w, h in ((1, 1), (2, 3), (16, 16), (23, 40), (200, 200))
        if x < width and y < height
    ]
    check_regions(data, denom, regions)


@libjpeg_turbo
@settings(max_examples=300, deadline=None)
@given(spec=specs, denom=st.sampled_from(DENOMS), draw=st.data())
def test_any_region_of_any_jpeg_equals_the_crop(
    spec: Spec, denom: int, draw: st.DataObject
) -> None:
    """Whatever size, sampling, quality and restarts, a region is that of the full decode."""
    data = make_jpeg(spec)
    width, height = decode_whole(data, denom).size
    (left, right), (top, bottom) = draw.draw(spans(width)), draw.draw(spans(height))
    check_regions(data, denom, [(left, top, right, bottom)])


@libjpeg_turbo
@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    factors=st.sampled_from(
        [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2), (1, 4), (2, 4), (3, 1), (1, 3)]
    ),
    denom=st.sampled_from(DENOMS),
    draw=st.data(),
)
def test_scans_apart_and_rare_samplings_equal_the_crop(
    size: tuple[int, int], factors: tuple[int, int], denom: int, draw: st.DataObject
) -> None:
    """Sequential files of several scans and rare samplings decode as Pillow does."""
    data = make_scans_apart(*size, factors)
    width, height = decode_whole(data, denom).size
    (left, right), (top, bottom) = draw.draw(spans(width)), draw.draw(spans(height))
    check_regions(data, denom, [(left, top, right, bottom)])


@same_version
@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(("4:4:4", "4:2:2", "4:2:0", "grey")),
    scans=st.integers(1, 5),
    denom=st.sampled_from(DENOMS),
    draw=st.data(),
)
def test_smoothed_progressive_regions_equal_the_crop(
    kind: str, scans: int, denom: int, draw: st.DataObject
) -> None:
    """Where libjpeg smooths over missing scans, the region has the neighbours that this needs."""
    data = keep_scans(
        make_jpeg(Spec(width=131, height=117, kind=kind, progressive=True, quality=60)), scans
    )
    width, height = decode_whole(data, denom).size
    (left, right), (top, bottom) = draw.draw(spans(width)), draw.draw(spans(height))
    check_regions(data, denom, [(left, top, right, bottom)])


@libjpeg_turbo
@pytest.mark.parametrize("denom", DENOMS)
def test_grey_with_sampling_factors_equals_the_crop(denom: int) -> None:
    """Grey files that state factors of 2x2, which mean nothing there, decode all the same."""
    data = patch_frame(make_jpeg(Spec(width=75, height=83, kind="grey")), 75, 83, (2, 2))
    width, height = decode_whole(data, denom).size
    check_regions(
        data, denom, [(x, y, width, height) for x in range(width) for y in range(0, height, 3)]
    )


@settings(max_examples=300, deadline=None)
@given(
    spec=specs,
    denom=st.sampled_from(DENOMS),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    flip=st.booleans(),
    resampling=st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]),
    draw=st.data(),
)
def test_resized_equals_pillows_resize_of_the_region(
    spec: Spec,
    denom: int,
    size: tuple[int, int],
    flip: bool,
    resampling: Image.Resampling,
    draw: st.DataObject,
) -> None:
    """Any box, to any size, mirrored or not, is bit-identical to Pillow's resize of the region."""
    if "post" in PIL.__version__:
        pytest.skip("Pillow-SIMD rounds resampling weights to 16 bits")
    data = make_jpeg(spec)
    width, height, _, _ = _jpeg.read_header(data)
    (left, right), (top, bottom) = (
        draw.draw(spans(-(-width // denom))),
        draw.draw(spans(-(-height // denom))),
    )
    region = (left, top, right, bottom)
    x0, x1 = sorted(
        draw.draw(st.lists(st.floats(left, right), min_size=2, max_size=2, unique=True))
    )
    y0, y1 = sorted(
        draw.draw(st.lists(st.floats(top, bottom), min_size=2, max_size=2, unique=True))
    )
    out = np.full((size[1], size[0], 3), 77, np.uint8)
    _jpeg.decode_resized(
        data, x0, y0, x1, y1, *region, denom, out, flip, filter=resampling.name.lower()
    )
    pixels = _jpeg.decode_region(data, *region, denom)
    crop = Image.frombytes("RGB", (right - left, bottom - top), pixels)
    expected = np.asarray(crop.resize(size, resampling, (x0 - left, y0 - top, x1 - left, y1 - top)))
    np.testing.assert_array_equal(out, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "grey"])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_raise_or_give_the_right_pixels(kind: str, progressive: bool) -> None:
    """Cut anywhere, a file raises or all that the region needs was there: no pixel is made up."""
    data = make_jpeg(Spec(width=96, height=96, kind=kind, progressive=progressive))
    out, expected = np.empty((40, 40, 3), np.uint8), np.empty((40, 40, 3), np.uint8)
    for region in ((0, 0, 96, 96), (10, 5, 60, 40), (50, 60, 96, 96)):
        pixels = _jpeg.decode_region(data, *region, 1)
        _jpeg.decode_resized(data, *region, *region, 1, expected)
        raised = 0
        for length in range(0, len(data), 7):
            try:
                assert _jpeg.decode_region(data[:length], *region, 1) == pixels
                _jpeg.decode_resized(data[:length], *region, *region, 1, out)
                np.testing.assert_array_equal(out, expected)
            except (_jpeg.CorruptError, _jpeg.UnsupportedError):
                raised += 1
        if region[3] == 96:
            assert raised >= len(range(0, len(data) - 40, 7))


def test_a_missing_end_marker_raises_in_progressive_files() -> None:
    """A progressive file that lost its end may have lost scans, so it is refused."""
    data = make_jpeg(Spec(width=96, height=96, progressive=True))
    with pytest.raises(_jpeg.CorruptError, match="Premature end"):
        _jpeg.decode_region(data[:-2], 0, 0, 96, 96, 1)


@pytest.mark.parametrize("progressive", [False, True])
def test_stray_bytes_before_the_end_marker_are_tolerated(progressive: bool) -> None:
    """Real photographs have them, Pillow decodes them, and no pixel depends on them."""
    data = make_jpeg(Spec(width=96, height=96, progressive=progressive))
    stray = data[:-2] + bytes(range(20)) + data[-2:]
    assert _jpeg.decode_region(stray, 0, 0, 96, 96, 1) == _jpeg.decode_region(data, 0, 0, 96, 96, 1)


def test_a_lost_restart_interval_raises() -> None:
    """Entropy-coded data that end before a restart marker are damage, not grey pixels."""
    data = make_jpeg(Spec(width=96, height=96, restart_blocks=3))
    first = data.index(b"\xff\xd0")
    second = data.index(b"\xff\xd1")
    with pytest.raises(_jpeg.CorruptError, match="Corrupt JPEG data"):
        _jpeg.decode_region(data[: first + 4] + data[second:], 0, 0, 96, 96, 1)


@settings(max_examples=400, deadline=None)
@given(spec=specs, denom=st.sampled_from(DENOMS), draw=st.data())
def test_flipped_bits_never_crash(spec: Spec, denom: int, draw: st.DataObject) -> None:
    """Damaged anywhere, a file decodes to something or raises one of the module's errors."""
    data = bytearray(make_jpeg(spec))
    for position in draw.draw(st.lists(st.integers(0, len(data) * 8 - 1), min_size=1, max_size=8)):
        data[position // 8] ^= 1 << position % 8
    out = np.empty((9, 9, 3), np.uint8)
    try:
        width, height, _, _ = _jpeg.read_header(data)
        region = (0, 0, -(-width // denom), -(-height // denom))
        assert (
            len(_jpeg.decode_region(data, *region, denom, max_pixels=65536))
            == region[2] * region[3] * 3
        )
        _jpeg.decode_resized(data, *region, *region, denom, out, max_pixels=65536)
    except (_jpeg.CorruptError, _jpeg.UnsupportedError, _jpeg.LimitError):
        pass


def test_what_is_not_taken_is_unsupported() -> None:
    """CMYK, other formats, 12 bits and lossless JPEG raise UnsupportedError, for Pillow to try."""
    cmyk, png = io.BytesIO(), io.BytesIO()
    Image.new("CMYK", (32, 32)).save(cmyk, "JPEG")
    Image.new("RGB", (32, 32)).save(png, "PNG")
    grey = make_jpeg(Spec(width=32, height=32, kind="grey"))
    frame = find_marker(grey, 0xC0)
    twelve_bits = (
        grey[: frame + 1] + b"\xc1" + grey[frame + 2 : frame + 4] + b"\x0c" + grey[frame + 5 :]
    )
    lossless = grey[: frame + 1] + b"\xc3" + grey[frame + 2 :]
    for data in (cmyk.getvalue(), png.getvalue(), twelve_bits, lossless):
        with pytest.raises(_jpeg.UnsupportedError):
            _jpeg.decode_region(data, 0, 0, 32, 32, 1)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\xff\xff"]
)
def test_stumps_of_files_raise(data: bytes) -> None:
    """Files of a few bytes raise in every function."""
    with pytest.raises(_jpeg.CorruptError):
        _jpeg.read_header(data)
    with pytest.raises(_jpeg.CorruptError):
        _jpeg.decode_region(data, 0, 0, 1, 1, 1)


def test_pixels_are_limited_before_work_is_done() -> None:
    """A file that claims 65500x65500 pixels raises LimitError at once; a caller's limit holds."""
    data = make_jpeg(Spec(width=96, height=96))
    bomb = patch_frame(data, 65500, 65500, (2, 2))
    with pytest.raises(_jpeg.LimitError, match="65500x65500"):
        _jpeg.decode_region(bomb, 0, 0, 8, 8, 1)
    with pytest.raises(_jpeg.LimitError, match="max_pixels=9215"):
        _jpeg.decode_region(data, 0, 0, 8, 8, 1, max_pixels=96 * 96 - 1)
    _jpeg.decode_region(data, 0, 0, 8, 8, 1, max_pixels=96 * 96)


def test_scans_are_limited() -> None:
    """A file with more scans than allowed raises LimitError; Pillow's own have ten."""
    data = make_jpeg(Spec(width=96, height=96, progressive=True))
    with pytest.raises(_jpeg.LimitError, match="max_scans=9"):
        _jpeg.decode_region(data, 0, 0, 8, 8, 1, max_scans=9)
    _jpeg.decode_region(data, 0, 0, 8, 8, 1, max_scans=10)
    apart = make_scans_apart(96, 96, (1, 1))
    last = apart.rfind(b"\xff\xda")
    with pytest.raises(_jpeg.LimitError, match="max_scans=100"):
        _jpeg.decode_region(apart[:last] + apart[last:-2] * 100 + apart[-2:], 0, 0, 8, 8, 1)


@pytest.mark.parametrize(
    ("region", "denom", "message"),
    [
        ((0, 0, 97, 96), 1, "not inside the image of 96x80"),
        ((0, 0, 96, 81), 1, r"region \(0, 0, 96, 81\)"),
        ((0, 0, 13, 1), 8, "12x10 at scale 1/8"),
        ((-1, 0, 9, 9), 1, r"but got \(-1, 0, 9, 9\)"),
        ((0, -1, 9, 9), 1, "must not be empty or negative"),
        ((9, 0, 9, 9), 1, "must not be empty or negative"),
        ((0, 9, 9, 8), 1, "must not be empty or negative"),
        ((0, 0, 2**31 - 1, 2**31 - 1), 1, "4611686014132420609 pixels"),
        ((0, 0, 9, 9), 3, "denom must be 1, 2, 4 or 8 but got 3"),
        ((0, 0, 9, 9), 0, "but got 0"),
    ],
)
def test_bad_regions_raise_value_error(
    region: tuple[int, int, int, int], denom: int, message: str
) -> None:
    """A region outside the image, empty or at an unknown scale raises, with the values."""
    data = make_jpeg(Spec(width=96, height=80))
    with pytest.raises(ValueError, match=message):
        _jpeg.decode_region(data, *region, denom)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((-0.1, 0, 9, 9), "lie inside the region"),
        ((0, 0, 10.1, 9), r"but got \(0, 0, 10.1, 9\)"),
        ((5, 0, 5, 9), "must not be empty"),
        ((0, float("nan"), 9, 9), "nan"),
        ((0, 0, float("inf"), 9), "inf"),
    ],
)
def test_bad_boxes_raise_value_error(box: tuple[float, float, float, float], message: str) -> None:
    """A box that leaves the region, is empty or not a number raises, with the values."""
    data = make_jpeg(Spec(width=96, height=96))
    with pytest.raises(ValueError, match=message):
        _jpeg.decode_resized(data, *box, 0, 0, 10, 10, 1, np.empty((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((4, 4), np.uint8), "has 2 dimensions"),
        (np.empty((4, 4, 4), np.uint8), r"shape \(height, width, 3\)"),
        (np.empty((4, 0, 3), np.uint8), "has 0"),
        (np.empty((4, 4, 3), np.float32), "4-byte items"),
        (np.empty((1, 65501, 3), np.uint8), "has 65501"),
        (bytearray(48), "has 1 dimensions"),
    ],
)
def test_bad_outputs_raise_value_error(out: Any, message: str) -> None:
    """Only uint8 buffers of shape (height, width, 3), of images' sizes, are written to."""
    with pytest.raises(ValueError, match=message):
        _jpeg.decode_resized(make_jpeg(Spec(width=96, height=96)), 0, 0, 9, 9, 0, 0, 9, 9, 1, out)


def test_unwritable_outputs_and_wrong_types_raise() -> None:
    """Read-only and strided buffers, text and unknown filters are refused."""
    data = make_jpeg(Spec(width=96, height=96))
    frozen = np.empty((4, 4, 3), np.uint8)
    frozen.flags.writeable = False
    for out in (frozen, np.empty((4, 8, 3), np.uint8)[:, ::2]):
        with pytest.raises((ValueError, BufferError)):
            _jpeg.decode_resized(data, 0, 0, 9, 9, 0, 0, 9, 9, 1, out)
    with pytest.raises(ValueError, match="filter must be 'bilinear' or 'bicubic' but got 'box'"):
        _jpeg.decode_resized(
            data, 0, 0, 9, 9, 0, 0, 9, 9, 1, np.empty((4, 4, 3), np.uint8), filter="box"
        )
    with pytest.raises(TypeError):
        _jpeg.read_header("text")


def test_threads_decode_at_once_with_the_right_result() -> None:
    """Eight threads over different files get what one thread gets."""
    files = [
        make_jpeg(Spec(width=200 + i, height=150, kind=KINDS[i % 7], progressive=i % 2 == 0))
        for i in range(14)
    ]

    def resize(data: bytes) -> bytes:
        out = np.empty((64, 64, 3), np.uint8)
        _jpeg.decode_resized(data, 10.5, 3, 180, 140.25, 10, 3, 181, 141, 1, out)
        return out.tobytes()

    expected = [resize(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(resize, files * 20)) == expected * 20


def test_memory_and_buffers_are_given_back() -> None:
    """Thousands of calls, failing and not, leave no memory behind and no buffer locked."""
    good = bytearray(make_jpeg(Spec(width=256, height=256)))
    cut = bytearray(make_jpeg(Spec(width=256, height=256, progressive=True))[:-2])
    out = np.empty((64, 64, 3), np.uint8)

    def cycle() -> None:
        for data in (good, cut):
            for bottom in (200, 300):
                try:
                    _jpeg.decode_region(data, 0, 0, 200, bottom, 1)
                    _jpeg.decode_resized(data, 0, 0, 200, bottom, 0, 0, 200, bottom, 1, out)
                except ValueError:
                    continue

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(200):
        cycle()
    before = resident()
    for _ in range(1500):
        cycle()
    assert resident() - before < 2**20
    good.append(0)
    cut.append(0)
