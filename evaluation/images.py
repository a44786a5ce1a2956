"""Encoded bytes to RGB pictures. What cannot be decoded is an error with a reason, not a crash."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from evaluation.tar import MAX_IMAGE_BYTES, Span

# Pillow's names of the formats of IMAGE_EXTENSIONS; no other decoder meets foreign bytes.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class UndecodableImageError(Exception):
    """The bytes are not an image that we read; the text says why."""


def read_image(span: Span) -> Image.Image:
    """Read and decode one image, as RGB; what is transparent becomes white, as in training.

    Raises UndecodableImageError; a picture of more pixels than Pillow deems safe (89 million) is
    refused from its header.
    """
    if span.num_bytes > MAX_IMAGE_BYTES:
        raise UndecodableImageError(f"{span.num_bytes:,} bytes are more than {MAX_IMAGE_BYTES:,}")
    data = span.read()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return decode_image(data)


def decode_image(data: bytes) -> Image.Image:
    """Decode one image as read_image does; for several threads at once.

    Where nobody made Pillow's warning of many pixels an error, it goes out, and then the error
    comes.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {limit:,}")
            return _on_white(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a hostile file provokes
        reason = str(error).partition(" <_io")[0] or type(error).__name__
        raise UndecodableImageError(reason) from None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
