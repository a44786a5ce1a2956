"""Pictures of samples as data URIs: read from their tars by byte range, made small, written anew.

The bytes are foreign: only known formats are opened, a picture's size is checked from its header
before any pixel is decoded, and what goes into the page is our own encoding of the pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from pathlib import Path

from PIL import Image

from evaluation.images import IMAGE_FORMATS
from tools.report.sources import SampleReference

MAX_SIDE_PIXELS = 96
MAX_SOURCE_BYTES = 64 << 20
MAX_SOURCE_PIXELS = 40_000_000
_PNG_BYTES_WORTH_KEEPING = 4096


def sample_picture(sample: SampleReference) -> str | None:
    """Return a small data URI of a sample's picture, None where it cannot be read."""
    if sample.image_offset is None or not sample.image_size or sample.image_offset < 0:
        return None
    if not 0 < sample.image_size <= MAX_SOURCE_BYTES:
        return None
    try:
        with Path(sample.shard).open("rb") as tar:
            tar.seek(sample.image_offset)
            content = tar.read(sample.image_size)
    except (OSError, ValueError):
        return None
    return small_data_uri(content)


def decoded_png(content: str) -> str | None:
    """Return a small data URI of a picture given in base64, None where it is not one."""
    try:
        return small_data_uri(base64.b64decode(content, validate=True))
    except (binascii.Error, ValueError):
        return None


def small_data_uri(content: bytes) -> str | None:
    """Return the picture, its longer side at most MAX_SIDE_PIXELS, None where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning: the size is checked here
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > MAX_SOURCE_PIXELS:
                return None
            image.draft("RGB", (2 * MAX_SIDE_PIXELS, 2 * MAX_SIDE_PIXELS))
            picture = image.convert("L" if image.mode in ("1", "L") else "RGBA")
    except Exception:  # decoders raise anything on broken bytes
        return None
    picture.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS), Image.Resampling.LANCZOS)
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    kind = "png"
    if buffer.tell() > _PNG_BYTES_WORTH_KEEPING and picture.mode == "RGB":
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, format="JPEG", quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
