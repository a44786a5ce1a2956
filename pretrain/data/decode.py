"""Image bytes to a uint8 tensor of the training size, with crops drawn by position.

JPEG is decoded at the scale that still covers the size needed (libjpeg's scaled decoding through
Pillow's `draft`). Alpha is composed on white, other modes become RGB, EXIF orientation is applied,
an animation gives its first frame. Images are hostile: the pixel count is checked from the header
first.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from configs import draws

UInt8Array = npt.NDArray[np.uint8]
# Named: Pillow would otherwise try every plug-in, and EPS starts Ghostscript on what it is given.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_NUM_DRAWS = 10 * 4 + 1  # area, aspect, x, y of ten tries; the flip


class UndecodableImageError(Exception):
    """The bytes are not an image that can be used; the text says why."""


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """RandomResizedCrop to `image_size` square pixels.

    `scale` is the range of the crop's share of the area, `ratio` that of its aspect (drawn
    log-uniformly, as in torchvision and open_clip); (1, 1) for both keeps the largest centred
    square.
    """

    image_size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    max_image_pixels: int

    def draw(self, seed: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the draws [b, 41] of the samples at `positions` [b]: ten crops, one flip."""
        return draws.uniform(seed, "image/crop", positions[:, None], np.arange(_NUM_DRAWS)[None, :])

    def __call__(self, data: bytes, drawn: npt.NDArray[np.float64]) -> UInt8Array:
        """Return [3, image_size, image_size] uint8, cropped by one row of `draw`.

        Raises UndecodableImageError.
        """
        image = self._open(data)
        box = self._crop(image.width, image.height, drawn)
        size = (self.image_size, self.image_size)
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
        if self.flip and drawn[-1] < 0.5:
            image = ImageOps.mirror(image)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

    def _open(self, data: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > self.max_image_pixels:
                raise UndecodableImageError(
                    f"{image.width} x {image.height} pixels are more than {self.max_image_pixels:,}"
                )
            # A crop of the smallest area must still cover the output after scaled decoding.
            stretch = max(self.ratio[1], 1 / self.ratio[0])
            needed = math.ceil(self.image_size * math.sqrt(stretch / self.scale[0]))
            image.draft("RGB", (needed, needed))
            return _to_rgb(ImageOps.exif_transpose(image))
        except UndecodableImageError:
            raise
        except (
            Exception
        ) as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ...
            raise UndecodableImageError(f"{type(error).__name__}: {error}") from None

    def _crop(
        self, width: int, height: int, drawn: npt.NDArray[np.float64]
    ) -> tuple[float, float, float, float]:
        """Draw the crop box (left, top, right, bottom) in pixels of the decoded image.

        Ten tries as in torchvision's RandomResizedCrop, then the largest centred box within
        `ratio`.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, aspect, x, y in drawn[:-1].reshape(-1, 4).tolist():
            target = width * height * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + aspect * (high - low))
            box_width, box_height = math.sqrt(target * ratio), math.sqrt(target / ratio)
            if box_width <= width and box_height <= height:
                left, top = x * (width - box_width), y * (height - box_height)
                return (left, top, left + box_width, top + box_height)
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        box_width, box_height = min(width, height * ratio), min(height, width / ratio)
        left, top = (width - box_width) / 2, (height - box_height) / 2
        return (left, top, left + box_width, top + box_height)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and wider: scale to 8 bits
        wide = np.asarray(image, dtype=np.float64)
        limit = 65535.0 if wide.max() > 255 else 255.0
        image = Image.fromarray((wide.clip(0, limit) * (255.0 / limit)).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
