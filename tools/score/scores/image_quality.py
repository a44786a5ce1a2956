"""Blur and entropy of a picture: no model needed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import PositiveInt

from configs.errors import ConfigError
from tools.score.base import Column, Picture, Score, scores

Gray = npt.NDArray[np.float64]


def laplacian_variance(gray_HW: Gray) -> float:
    """Return the variance of the Laplacian [[0 1 0] [1 -4 1] [0 1 0]] of gray values [H, W].

    Over all pixels; beyond the border the picture is mirrored at its outermost pixels (OpenCV's
    default). J. Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR 2000).
    """
    padded = np.pad(gray_HW, 1, mode="reflect" if min(gray_HW.shape) > 1 else "edge")
    beside = padded[1:-1, :-2] + padded[1:-1, 2:] + padded[:-2, 1:-1] + padded[2:, 1:-1]
    return float(np.var(beside - 4 * gray_HW))


def gray_entropy(gray_HW: npt.NDArray[np.uint8]) -> float:
    """Return the entropy of the histogram of 256 gray values, in bits: 0 (one value) to 8."""
    counts = np.bincount(gray_HW.ravel(), minlength=256)
    shares = counts[counts > 0] / gray_HW.size
    return float(-(shares * np.log2(shares)).sum()) + 0.0


class _ImageQuality(Score):
    def __init__(self, blur: str | None, entropy: str | None, max_side: int) -> None:
        super().__init__(columns={"blur": blur, "entropy": entropy})
        self._max_side = max_side

    def look(self, picture: Picture) -> Mapping[str, float]:
        image = picture.image.convert("L")
        if max(image.size) > self._max_side:
            image.thumbnail((self._max_side, self._max_side), Image.Resampling.BOX)
        gray_HW = np.asarray(image)
        found = {}
        if "blur" in self.columns:
            found[self.columns["blur"]] = laplacian_variance(gray_HW.astype(np.float64))
        if "entropy" in self.columns:
            found[self.columns["entropy"]] = gray_entropy(gray_HW)
        return found


@scores.register("image_quality")
def image_quality(
    *, blur: Column | None = "blur", entropy: Column | None = "entropy", max_side: PositiveInt = 512
) -> Score:
    """Variance of the Laplacian (small: blurred) and entropy of the gray histogram (small: flat).

    Of the picture in gray (ITU-R 601), reduced by averaging to `max_side` pixels where it is
    larger: a large picture is blurred for a model of 224 pixels only where it is at that scale.
    `blur` and `entropy` name the columns; null: not wanted.
    """
    if blur is None and entropy is None:
        raise ConfigError("image_quality: both `blur` and `entropy` are null; name one of them.")
    return _ImageQuality(blur, entropy, max_side)
