"""Read an image's width and height from its first bytes, without decoding it.

Anything from the web is hostile: only six plain formats are tried, a header that promises too many
pixels is refused before any memory is asked for, and every failure of a parser is one answer.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Most headers end in the first; a long EXIF block or colour profile needs the second.
_PREFIX_BYTES = (4096, 65536)
# A header that does not end within this many bytes is not one.
MAX_IMAGE_BYTES = 256 << 20
# What the index can hold of a side, in pixels.
MAX_SIDE = 2**31 - 1
_LOCK = threading.Lock()


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


def _size(data: bytes) -> tuple[int, int] | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
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


def _webp_size(data: bytes) -> tuple[int, int] | None:
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
