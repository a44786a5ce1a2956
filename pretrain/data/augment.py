"""A picture to a uint8 tensor of the training size: crop, resize, flip, colour, all drawn by
position.

The crop is torchvision's RandomResizedCrop (whole pixels of the picture); the resize is torch's
bicubic with antialiasing on uint8, Pillow's to a rounding (https://pytorch.org/docs, interpolate);
colour jitter, gray and blur are torchvision's on the small picture, in SLIP's order. Normalization
is the model's, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from configs import draws
from pretrain.data.decode import UInt8Array, open_image, scale_for
from pretrain.model.torchvision_ops import ensure_torchvision

_TRIES = 10
_NUM_CROP_DRAWS = _TRIES * 4 + 1  # area, aspect, x, y of ten tries; the flip
_NUM_COLOUR_DRAWS = 9  # jitter?, order, four strengths, gray?, blur?, its sigma
_BLUR_SIGMAS = 3.0  # radius of the kernel in standard deviations: 0.3 % of a Gaussian lie beyond
Crop = Literal["random", "center", "squash", "enclosing"]
Jitter = tuple[float, float, float, float]


class Box(NamedTuple):
    """A rectangle in whole pixels of the picture."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Image bytes to `image_size` square pixels.

    `crop`: `random` draws a box whose share of the area is in `scale` and whose aspect is in
    `ratio` (log-uniformly, as torchvision and open_clip do); `center` takes the largest centred
    square; `squash` takes all of the picture, whatever its shape; `enclosing` is told its box, one
    that holds other crops (`around`). `jitter`: brightness, contrast, saturation and hue, as in
    torchvision's ColorJitter, applied with `jitter_probability`.
    `blur_sigma`: range of the standard deviation of a Gaussian blur, in pixels of the small picture
    (SLIP, Mu et al., arXiv:2112.12750, blurs half of its views with 0.1 to 2.0).
    """

    image_size: int
    crop: Crop = "random"
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.0
    gray_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    max_image_pixels: int

    def draw(
        self, seed: int, positions: npt.NDArray[np.int64], view: int = 0
    ) -> npt.NDArray[np.float64]:
        """Return the draws [b, 50] of the samples at `positions` [b] for augmented view `view`."""
        number = np.arange(_NUM_CROP_DRAWS + _NUM_COLOUR_DRAWS)[None, :]
        return draws.uniform(seed, f"image/view{view}", positions[:, None], number)

    def __call__(
        self,
        data: bytes,
        drawn: npt.NDArray[np.float64],
        out: Tensor | None = None,
        *,
        crop: tuple[Box, int] | None = None,
    ) -> Tensor:
        """Return [3, image_size, image_size] uint8 as one row of `draw` says, written to `out`;
        `crop` is the box of an enclosing crop, with its scale (`around`).

        Raises UndecodableImageError.
        """
        image = open_image(data, max_image_pixels=self.max_image_pixels)
        box, scale = crop or self._box(image.width, image.height, drawn)
        if not image.can_scale:
            scale = 1
        x = self._resized(image.pixels(scale), _divided(box, scale))
        if self.mirrors(drawn):
            x = x.flip(-1)
        if self.jitter_probability or self.gray_probability or self.blur_probability:
            x = self._coloured(x, drawn[_NUM_CROP_DRAWS:].tolist())
        return x.contiguous() if out is None else out.copy_(x)

    def box(self, width: int, height: int, drawn: npt.NDArray[np.float64]) -> Box:
        """Return the crop of a picture of that size, in its pixels."""
        return self._box(width, height, drawn)[0]

    def mirrors(self, drawn: npt.NDArray[np.float64]) -> bool:
        """Return whether the picture is flipped."""
        return bool(self.flip and drawn[_NUM_CROP_DRAWS - 1] < 0.5)

    def around(
        self,
        boxes: Sequence[Box],
        width: int,
        height: int,
        drawn: npt.NDArray[np.float64],
    ) -> tuple[Box, int]:
        """Return a box of a picture that holds all `boxes`, each edge drawn uniformly between
        theirs and the picture's and moved outwards to the grid of scaled decoding; and its scale.
        """
        shares = drawn[:4].tolist()
        left = int(shares[0] * (min(box.left for box in boxes) + 1))
        top = int(shares[1] * (min(box.top for box in boxes) + 1))
        right = max(box.left + box.width for box in boxes)
        bottom = max(box.top + box.height for box in boxes)
        right += int(shares[2] * (width - right + 1))
        bottom += int(shares[3] * (height - bottom + 1))
        scale = scale_for(min(right - left, bottom - top), self.image_size)
        left, top = left // scale * scale, top // scale * scale
        right, bottom = (scale * -(-edge // scale) for edge in (right, bottom))
        return Box(left, top, min(width, right) - left, min(height, bottom) - top), scale

    def _box(self, width: int, height: int, drawn: npt.NDArray[np.float64]) -> tuple[Box, int]:
        """Return the crop, moved to the grid of scaled decoding, and its scale."""
        box = self._drawn_box(width, height, drawn)
        scale = scale_for(min(box.width, box.height), self.image_size)
        if scale == 1:
            return box, 1
        left, top = scale * round(box.left / scale), scale * round(box.top / scale)
        right = min(width, scale * round((box.left + box.width) / scale))
        bottom = min(height, scale * round((box.top + box.height) / scale))
        return Box(left, top, right - left, bottom - top), scale

    def _drawn_box(self, width: int, height: int, drawn: npt.NDArray[np.float64]) -> Box:
        assert self.crop != "enclosing", "its box is given"
        if self.crop == "squash":
            return Box(0, 0, width, height)
        if self.crop == "center":
            side = min(width, height)
            return Box((width - side) // 2, (height - side) // 2, side, side)
        # Ten tries as in torchvision's RandomResizedCrop, then the largest centred box in `ratio`.
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for first in range(0, 4 * _TRIES, 4):
            area, aspect, x, y = drawn[first : first + 4].tolist()
            target = width * height * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + aspect * (high - low))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(x * (width - w + 1)), int(y * (height - h + 1)), w, h)
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = max(1, min(width, round(height * ratio)))
        h = max(1, min(height, round(width / ratio)))
        return Box((width - w) // 2, (height - h) // 2, w, h)

    def _resized(self, pixels: UInt8Array, box: Box) -> Tensor:
        part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        if any(stride < 0 for stride in part.strides) or not part.flags.writeable:
            part = part.copy()  # torch takes neither
        x = torch.from_numpy(part).permute(2, 0, 1)[None]
        size = (self.image_size, self.image_size)
        if x.shape[-2:] == size:
            return x[0]
        return functional.interpolate(x, size, mode="bicubic", antialias=True)[0]

    def _coloured(self, x: Tensor, drawn: list[float]) -> Tensor:
        jitter, order, *strengths, gray, blur, sigma = drawn
        colour = _colour_functions()
        if jitter < self.jitter_probability:
            left = [0, 1, 2, 3]  # one of the 24 orders, as ColorJitter draws one
            chosen = int(order * 24)
            for n in (4, 3, 2, 1):
                chosen, which = divmod(chosen, n)
                kind = left.pop(which)
                low, high = _factors(kind, self.jitter[kind])
                if low < high:
                    x = colour[kind](x, low + strengths[kind] * (high - low))
        if gray < self.gray_probability:
            x = colour[4](x)
        if blur < self.blur_probability:
            low, high = self.blur_sigma
            deviation = low + sigma * (high - low)
            x = colour[5](x, deviation)
        return x


def _divided(box: Box, scale: int) -> Box:
    """Return a box on the grid of `scale` in pixels of the picture decoded at 1 / scale."""
    left, top = box.left // scale, box.top // scale
    right, bottom = -(-(box.left + box.width) // scale), -(-(box.top + box.height) // scale)
    return Box(left, top, right - left, bottom - top)


def _factors(kind: int, strength: float) -> tuple[float, float]:
    """Return the range of a jitter factor: hue (kind 3) is around 0, the others around 1."""
    if kind == 3:
        return -strength, strength
    return max(0.0, 1.0 - strength), 1.0 + strength


def _colour_functions() -> list[Any]:
    ensure_torchvision()
    from torchvision.transforms.v2 import functional as colour

    return [
        colour.adjust_brightness,
        colour.adjust_contrast,
        colour.adjust_saturation,
        colour.adjust_hue,
        lambda x: colour.rgb_to_grayscale(x, num_output_channels=3),
        lambda x, sigma: colour.gaussian_blur(x, _blur_size(x.shape[-1], sigma), sigma),
    ]


def _blur_size(side: int, sigma: float) -> list[int]:
    """Return the kernel's size: torchvision mirrors the borders, so no wider than the picture."""
    radius = min(math.ceil(_BLUR_SIGMAS * sigma), side - 1)
    return [2 * radius + 1] * 2
