"""Read an image's width and height from its first bytes, without decoding it.

Anything from the web is hostile: only six plain formats are tried, a header that promises too many
pixels is refused before any memory is asked for, and every failure of a parser is one answer.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Most headers end in the first; a long EXIF block or colour profile needs the second.
_PREFIX_BYTES = (4096, 65536)
# A header that does not end within this many bytes is not one.
MAX_IMAGE_BYTES = 256 << 20
# What the index can hold of a side, in pixels.
MAX_SIDE = 2**31 - 1
_LOCK = threading.Lock()
# Baseline, extended and progressive; lossless, hierarchical and arithmetic ones are not decoded.
_START_OF_FRAME = frozenset({0xC0, 0xC1, 0xC2})
_FRAME = struct.Struct(">BHHB")
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_IHDR = struct.Struct(">IIBBBBBI")
_PNG_MODES = frozenset(
    [(depth, 0) for depth in (1, 2, 4, 8, 16)]
    + [(depth, 3) for depth in (1, 2, 4, 8)]
    + [(depth, kind) for kind in (2, 4, 6) for depth in (8, 16)]
)


def read_image_size(
    read: Callable[[int], bytes], num_bytes: int, max_pixels: int
) -> tuple[tuple[int, int] | None, str | None]:
    """Return ((width, height) in pixels, problem); the size also where it is too many pixels.

    A side above MAX_SIDE is too many pixels under any limit, and has no size.
    `read(n)` gives the first n bytes of the image, which has `num_bytes`.
    """
    if num_bytes == 0:
        return None, "empty image"
    for prefix in (*(p for p in _PREFIX_BYTES if p < num_bytes), min(num_bytes, MAX_IMAGE_BYTES)):
        size = _size(read(prefix))
        if size is not None:
            width, height = size
            if width < 1 or height < 1:
                return None, "bad image header"
            if max(size) > MAX_SIDE:
                return None, "too many pixels"
            return size, "too many pixels" if width * height > max_pixels else None
    return None, "bad image header"


def quick_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Return (width, height) in pixels from the first bytes of a JPEG, PNG or WebP; None: not sure.

    Ten times faster than Pillow, and as strict: what is unusual is left to it.
    """
    if data[:2] == b"\xff\xd8":
        return _jpeg_size(data)
    if data[:16] == _PNG_START:
        return _png_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp_size(data)
        return size if size and max(size) <= MAX_SIDE and min(size) > 0 else None
    return None


def _jpeg_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Go from segment to segment to the start of frame (ITU-T T.81, B.2.2), then to a scan."""
    at, end, size = 2, len(data) - 9, None
    while at < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xDA:  # start of scan
            return size
        if marker in _START_OF_FRAME:
            precision, height, width, components = _FRAME.unpack_from(data, at + 4)
            if precision != 8 or components not in (1, 3, 4) or not width or not height:
                return None
            size = width, height
        elif not (marker == 0xC4 or 0xDB <= marker <= 0xEF or marker == 0xFE):
            return None
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2:
            return None
        at += 2 + length
    return None


def quick_jpeg_sizes(
    data: npt.NDArray[np.uint8], positions: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return (width, height), one row an image, of the JPEGs at `data[positions[i] : ends[i]]`.

    What `quick_size` says of each; (0, 0) where it is not sure, and for other formats.
    """
    from curation import kernels

    sizes = np.empty((len(positions), 2), np.int64)
    kernels.jpeg_sizes(data, positions, ends, sizes)
    return sizes


def _png_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Read the header chunk (PNG specification, 11.2.2)."""
    if len(data) < 33:
        return None
    width, height, depth, kind, *rest = _IHDR.unpack_from(data, 16)
    is_good = (depth, kind) in _PNG_MODES and rest[:2] == [0, 0] and rest[2] in (0, 1)
    if not is_good or zlib.crc32(data[12:29]) != rest[3] or not width or not height:
        return None
    return (width, height) if max(width, height) <= MAX_SIDE else None


def _size(data: bytes) -> tuple[int, int] | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    size = quick_size(data)
    if size is not None:
        return size
    with no_pillow_limit():
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.size
        except (
            Exception
        ):  # a hostile header may raise anything in a parser: each is "cannot be read"
            return None


@contextmanager
def no_pillow_limit() -> Iterator[None]:
    """Lift Pillow's own limit of pixels, a global that warns or raises: the caller's counts."""
    with _LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _webp_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Read a WebP header (RFC 9649): Pillow would allocate the whole canvas for it."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        width, height = int.from_bytes(body[4:7], "little"), int.from_bytes(body[7:10], "little")
        return width + 1, height + 1
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return width & 0x3FFF, height & 0x3FFF
    return None
