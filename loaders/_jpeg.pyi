import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

LIBJPEG_TURBO_VERSION: str

class CorruptError(ValueError): ...
class UnsupportedError(ValueError): ...
class LimitError(ValueError): ...

def read_header(data: Buffer, /) -> tuple[int, int, int, bool]: ...
def decode_region(
    data: Buffer,
    left: int,
    top: int,
    right: int,
    bottom: int,
    denom: int,
    *,
    max_pixels: int = ...,
    max_scans: int = ...,
) -> bytes: ...
def decode_resized(
    data: Buffer,
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    left: int,
    top: int,
    right: int,
    bottom: int,
    denom: int,
    out: npt.NDArray[np.uint8],
    flip: bool = ...,
    *,
    filter: str = ...,  # noqa: A002
    max_pixels: int = ...,
    max_scans: int = ...,
) -> None: ...
