"""JPEGs of all kinds, also those that Pillow reads and does not write."""

import io
import struct
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

# What Pillow cannot write is made of what it can: the stream of MCUs of one sampling, with the
# factors of another that has as many blocks in an MCU. The picture is scrambled; no matter.
WRITTEN_AS = {
    "4:4:4": "4:4:4",
    "4:2:2": "4:2:2",
    "4:2:0": "4:2:0",
    "4:4:0": "4:2:2",
    "4:1:1": "4:2:0",
}
FACTORS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2), "4:4:0": (1, 2), "4:1:1": (4, 1)}
KINDS = (*WRITTEN_AS, "grey", "rgb")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A JPEG to make."""

    width: int
    height: int
    kind: str = "4:2:0"
    progressive: bool = False
    quality: int = 85
    restart_blocks: int = 0


@cache
def photo(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Make an RGB picture with gradients, edges, texture and saturated spots."""
    rng = np.random.default_rng(width * 65536 + height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(x / rng.uniform(3, 40) + y / rng.uniform(3, 40) + rng.uniform(0, 6))
        for _ in range(3)
    ]
    picture = 128 + 70 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    for _ in range(6):
        top, left = rng.integers(height), rng.integers(width)
        picture[top : top + height // 4 + 1, left : left + width // 4 + 1] += rng.uniform(
            -200, 200, 3
        )
    return picture.clip(0, 255).astype(np.uint8)


def find_marker(data: bytes, *markers: int) -> int:
    """Return where the first of these markers stands before the first scan."""
    position = 2
    while data[position + 1] not in markers:
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return position


def patch_frame(data: bytes, width: int, height: int, factors: tuple[int, int]) -> bytes:
    """Give a JPEG another size and other sampling factors of its first component."""
    frame = find_marker(data, 0xC0, 0xC1, 0xC2)
    size = struct.pack(">HH", height, width)
    factor = bytes([factors[0] << 4 | factors[1]])
    return data[: frame + 5] + size + data[frame + 9 : frame + 11] + factor + data[frame + 12 :]


def make_jpeg(spec: Spec) -> bytes:
    """Make a JPEG; where a kind needs it, a progressive one is up to 24 pixels larger."""
    options = {
        "quality": spec.quality,
        "progressive": spec.progressive,
        "restart_marker_blocks": spec.restart_blocks,
    }
    file = io.BytesIO()
    if spec.kind in ("grey", "rgb"):
        image = Image.fromarray(photo(spec.width, spec.height))
        image = image.convert("L") if spec.kind == "grey" else image
        image.save(file, "JPEG", keep_rgb=spec.kind == "rgb", subsampling="4:4:4", **options)
        return file.getvalue()
    width, height = spec.width, spec.height
    written = WRITTEN_AS[spec.kind]
    if written == spec.kind:
        image = Image.fromarray(photo(width, height))
        image.save(file, "JPEG", subsampling=written, **options)
        return file.getvalue()
    h, v = FACTORS[spec.kind]
    columns, rows = -(-width // (8 * h)), -(-height // (8 * v))
    if spec.progressive:  # scans of one component lack the blocks beyond the edge: have none
        width = max(width, columns * 8 * h - 7)
        height = max(height, rows * 8 * v - 7)
    written_h, written_v = FACTORS[written]
    image = Image.fromarray(photo(columns * 8 * written_h, rows * 8 * written_v))
    image.save(file, "JPEG", subsampling=written, **options)
    return patch_frame(file.getvalue(), width, height, (h, v))


def make_scans_apart(width: int, height: int, factors: tuple[int, int]) -> bytes:
    """Make a sequential JPEG with a scan for each component; the first has these factors."""
    h, v = factors
    planes = []
    for component in range(3):
        size = (width, height) if component == 0 else (-(-width // h), -(-height // v))
        file = io.BytesIO()
        Image.fromarray(photo(*size)[..., component]).save(file, "JPEG", quality=85)
        planes.append(file.getvalue())
    frame, scans = find_marker(planes[0], 0xC0), [find_marker(plane, 0xDA) for plane in planes]
    after_frame = frame + 2 + 11
    components = b"".join(bytes([i + 1, (h << 4 | v) if i == 0 else 0x11, 0]) for i in range(3))
    header = struct.pack(">HHBHHB", 0xFFC0, 17, 8, height, width, 3) + components
    body = b"".join(
        plane[scan : scan + 5] + bytes([i + 1]) + plane[scan + 6 : -2]
        for i, (plane, scan) in enumerate(zip(planes, scans, strict=True))
    )
    return planes[0][:frame] + header + planes[0][after_frame : scans[0]] + body + b"\xff\xd9"


def keep_scans(data: bytes, count: int) -> bytes:
    """Return a progressive JPEG with its first `count` scans: libjpeg smooths what is missing."""
    position = -1
    for _ in range(count + 1):
        position = data.index(b"\xff\xda", position + 1)
    tables = data.rfind(b"\xff\xc4", 0, position)
    previous = data.rfind(b"\xff\xda", 0, position)
    return data[: tables if tables > previous else position] + b"\xff\xd9"
