"""Image bytes to RGB pixels, no larger than they are needed.

JPEG goes through libjpeg-turbo (simplejpeg): decoded whole, or scaled by 1/2, 1/4 or 1/8 where that
still leaves one and a half times the resolution needed: the resize that follows then stays near
PIL's bicubic of the whole picture (the scales between are slower than no scaling). Everything else,
and what libjpeg-turbo finds fault with, goes through Pillow. Alpha is composed on white, other
modes become RGB, EXIF orientation is applied, an animation gives its first frame. Images are
hostile: the pixel count is checked from the header first.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

UInt8Array = npt.NDArray[np.uint8]
# Named: Pillow would otherwise try every plug-in, and EPS starts Ghostscript on what it is given.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112


def scale_for(num_pixels: int, needed: int) -> int:
    """Return by which of 1, 2, 4, 8 a JPEG may be divided of which `num_pixels` become `needed`.

    One and a half decoded pixels stay for each one needed: below that the error of scaled decoding
    is above 35 dB on photographs (36.3 dB at 1.43, 34.6 dB at 1.25, medians).
    """
    return next((scale for scale in (8, 4, 2) if 3 * needed * scale <= 2 * num_pixels), 1)


class UndecodableImageError(Exception):
    """The bytes are not an image that can be used: what kind of problem, and why."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


@dataclass
class OpenImage:
    """An image whose header was read: `width` and `height` as seen, orientation applied."""

    width: int
    height: int
    _data: bytes
    _orientation: int
    _picture: Image.Image | None  # None: a JPEG for libjpeg-turbo

    @property
    def can_scale(self) -> bool:
        """Whether `pixels` can decode at a fraction of the size."""
        return self._picture is None

    def pixels(self, scale: int = 1) -> UInt8Array:
        """Return [ceil(height / scale), ceil(width / scale), 3] uint8; `scale`: 1, 2, 4 or 8.

        Raises UndecodableImageError.
        """
        try:
            if self._picture is None:
                return self._jpeg(scale)
            return np.asarray(_to_rgb(ImageOps.exif_transpose(self._picture)))
        except MemoryError:
            raise
        except Exception as error:  # OSError, ValueError, SyntaxError, struct.error, ...
            problem = f"{type(error).__name__}: {error}"
            raise UndecodableImageError("undecodable image", problem) from None

    def _jpeg(self, scale: int) -> UInt8Array:
        width, height = -(-self.width // scale), -(-self.height // scale)
        sides = (width, height) if self._orientation >= 5 else (height, width)
        try:
            pixels: UInt8Array = simplejpeg.decode_jpeg(
                self._data, min_height=sides[0], min_width=sides[1]
            )
        except ValueError:
            # A warning of the decoder: Pillow, as every other trainer, decides what is damage.
            picture = Image.open(io.BytesIO(self._data), formats=("JPEG",))
            whole = np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
            if scale == 1:
                return whole
            small = Image.fromarray(whole).resize((width, height), Image.Resampling.BOX)
            return np.asarray(small)
        return _oriented(pixels, self._orientation)


def open_image(data: bytes, *, max_image_pixels: int) -> OpenImage:
    """Read the header of an image. Raises UndecodableImageError, also above `max_image_pixels`."""
    opened = _open_jpeg(data) if data[:2] == b"\xff\xd8" else None
    if opened is None:
        try:
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            orientation = picture.getexif().get(_ORIENTATION, 1)
        except Image.DecompressionBombError as error:  # Pillow's own limit, above which it stops
            raise UndecodableImageError("too many pixels", str(error)) from None
        except Exception as error:  # whatever a hostile file provokes
            reason = str(error).partition(" <_io")[0]
            problem = f"{type(error).__name__}: {reason}"
            raise UndecodableImageError("undecodable image", problem) from None
        width, height = picture.size
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        opened = OpenImage(width, height, data, 1, picture)
    if opened.width * opened.height > max_image_pixels:
        raise UndecodableImageError(
            "too many pixels",
            f"{opened.width} x {opened.height} pixels are more than {max_image_pixels:,}",
        )
    return opened


def _open_jpeg(data: bytes) -> OpenImage | None:
    """Return a JPEG that libjpeg-turbo can turn into RGB; None: let Pillow try."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB", "Gray"):  # CMYK and YCCK
        return None
    orientation = _orientation(data)
    if orientation >= 5:
        width, height = height, width
    return OpenImage(width, height, data, orientation, None)


def _orientation(data: bytes) -> int:
    if not _has_exif(data):
        return 1
    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG",))
        found = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # Exif that cannot be read turns nothing
        return 1
    return found if found in range(1, 9) else 1


def _has_exif(data: bytes) -> bool:
    """Return whether one of the segments before the picture is Exif's."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        if data[at + 4 : at + 10] == b"Exif\0\0":
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _oriented(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """Apply EXIF orientations 1 to 8, as ImageOps.exif_transpose does."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and wider: scale to 8 bits
        wide = np.asarray(image, dtype=np.float64)
        limit = 65535.0 if image.mode.startswith("I;16") or wide.max() > 255 else 255.0
        image = Image.fromarray((wide.clip(0, limit) * (255.0 / limit)).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
