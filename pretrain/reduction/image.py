"""Image token reduction: which patches of each sample stay, drawn by position (never by worker or
rank).

    reduction: {name: random, mask_ratio: 0.5}   FLIP, arXiv:2212.00794
    reduction: {name: grid, window: 2}           one patch of each 2 x 2 window (CLIPA)
    reduction: {name: block, mask_ratio: 0.75}   one square of neighbours (CLIPA)
    reduction: {name: attentive}                 what a mean teacher attends to (A-CLIP)

CLIPA (Li et al., arXiv:2305.07017) also reduces by resizing the image: that is `image_size`. The
class token always stays; nothing is removed in evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, isqrt, pi
from typing import Annotated, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt

from configs import draws
from configs.errors import ConfigError
from configs.registry import Registry

Fraction = Annotated[float, Field(ge=0, lt=1)]
Window = Annotated[int, Field(ge=2)]
Positions = npt.NDArray[np.int64]
Kept = npt.NDArray[np.int16]


class ImageReduction(Protocol):
    """Which of the side x side patches (row by row) of an image stay."""

    in_model: ClassVar[bool]  # chosen by the model (`kept` is not asked), not drawn in the loader

    def num_kept(self, side: int) -> int:
        """Return how many stay: the same number in every image of a batch."""
        ...

    def kept(self, seed: int, positions: Positions, side: int) -> Kept:
        """Return the kept patches [b, K], ascending, of the samples at global `positions` [b]."""
        ...

    def __str__(self) -> str:
        """Say it in words."""
        ...


image_reductions: Registry[ImageReduction] = Registry("reduction")


@dataclass(frozen=True)
class RandomPatches:
    """int(L * (1 - mask_ratio)) of L patches, uniformly without replacement, at least one."""

    mask_ratio: float
    in_model: ClassVar[bool] = False

    def num_kept(self, side: int) -> int:
        """Return how many of the side * side patches stay."""
        return max(1, int(side * side * (1.0 - self.mask_ratio)))

    def kept(self, seed: int, positions: Positions, side: int) -> Kept:
        """Return the kept patches [b, K], ascending."""
        number = np.arange(side * side)[None, :]
        keys = draws.bits(seed, "reduction/random", positions[:, None], number)
        kept = np.argsort(keys, axis=1, kind="stable")[:, : self.num_kept(side)]
        return np.sort(kept, axis=1).astype(np.int16)

    def __str__(self) -> str:
        return f"mask ratio {self.mask_ratio:g}" if self.mask_ratio else "no masking"


@dataclass(frozen=True)
class GridPatches:
    """One patch of each window x window; which corner is drawn once a sample."""

    window: int
    in_model: ClassVar[bool] = False

    def num_kept(self, side: int) -> int:
        """Return how many of the side * side patches stay. Raises ConfigError."""
        return _windows(side, self.window, "grid") ** 2

    def kept(self, seed: int, positions: Positions, side: int) -> Kept:
        """Return the kept patches [b, K], ascending."""
        drawn = draws.uniform(seed, "reduction/grid", positions[:, None], np.arange(2)[None, :])
        top, left = (drawn * self.window).astype(np.int64).T
        rows_r = np.arange(0, side, self.window)
        assert len(rows_r) ** 2 == self.num_kept(side)
        corner_K = (rows_r[:, None] * side + rows_r[None, :]).reshape(-1)
        return _shifted(corner_K, top * side + left)

    def __str__(self) -> str:
        return f"one patch of each {self.window} x {self.window}"


@dataclass(frozen=True)
class BlockPatches:
    """The largest square with at most int(L * (1 - mask_ratio)) patches, anywhere, uniformly."""

    mask_ratio: float
    in_model: ClassVar[bool] = False

    def num_kept(self, side: int) -> int:
        """Return how many of the side * side patches stay."""
        return self._side(side) ** 2

    def kept(self, seed: int, positions: Positions, side: int) -> Kept:
        """Return the kept patches [b, K], ascending."""
        block = np.arange(self._side(side))
        drawn = draws.uniform(seed, "reduction/block", positions[:, None], np.arange(2)[None, :])
        top, left = (drawn * (side - len(block) + 1)).astype(np.int64).T
        corner_K = (block[:, None] * side + block[None, :]).reshape(-1)
        return _shifted(corner_K, top * side + left)

    def _side(self, side: int) -> int:
        return max(1, isqrt(int(side * side * (1.0 - self.mask_ratio))))

    def __str__(self) -> str:
        return f"one block, mask ratio {self.mask_ratio:g}"


@dataclass(frozen=True)
class AttentivePatches:
    """The blocks of window x window patches with the highest scores (model/attentive.py).

    int(N * (1 - mask_ratio)) + 1 of N blocks, as in A-CLIP's code: 25 of 49 at one half.
    """

    mask_ratio: float
    window: int
    momentum: float
    in_model: ClassVar[bool] = True

    def num_kept(self, side: int) -> int:
        """Return how many of the side * side patches stay. Raises ConfigError."""
        return self.num_blocks(side) * self.window**2

    def num_blocks(self, side: int) -> int:
        """Return how many blocks stay. Raises ConfigError."""
        num_blocks = _windows(side, self.window, "attentive") ** 2
        return min(num_blocks, int(num_blocks * (1.0 - self.mask_ratio)) + 1)

    def kept(self, seed: int, positions: Positions, side: int) -> Kept:
        """The model chooses them."""
        raise AssertionError("attentive masking is computed in the model")

    def momentum_at(self, progress: float) -> float:
        """Return the mean teacher's momentum when the share `progress` of the run is done: from
        `momentum` to 1, along a half cosine.
        """
        return 1.0 - (1.0 - self.momentum) * (cos(pi * progress) + 1.0) / 2.0

    def __str__(self) -> str:
        return f"attentive masking, mask ratio {self.mask_ratio:g}"


def _windows(side: int, window: int, name: str) -> int:
    if side % window:
        raise ConfigError(
            f"reduction {name}: {side} x {side} patches do not divide into windows of "
            f"{window} x {window}; choose another window or image_size."
        )
    return side // window


def _shifted(patch_K: Positions, by_b: Positions) -> Kept:
    kept: Kept = (patch_K[None, :] + by_b[:, None]).astype(np.int16)
    return kept


@image_reductions.register("random")
def random(*, mask_ratio: Fraction = 0.0) -> ImageReduction:
    """FLIP's random masking: the fraction `mask_ratio` of the patches is removed (2212.00794)."""
    return RandomPatches(mask_ratio)


@image_reductions.register("grid")
def grid(*, window: Window = 2) -> ImageReduction:
    """CLIPA's grid masking: one corner of each 2 x 2 window stays (2305.07017, section 3)."""
    return GridPatches(window)


@image_reductions.register("block")
def block(*, mask_ratio: Fraction) -> ImageReduction:
    """CLIPA's block masking: one large block of the image stays (2305.07017, section 3)."""
    return BlockPatches(mask_ratio)


@image_reductions.register("attentive")
def attentive(
    *,
    mask_ratio: Fraction = 0.5,
    window: PositiveInt = 2,
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996,
) -> ImageReduction:
    """A-CLIP's attentive masking: what an average of the image tower attends to stays (2212.08653).

    Of each view in `data.views`, by the scores of the crop that encloses them.
    """
    return AttentivePatches(mask_ratio, window, momentum)
