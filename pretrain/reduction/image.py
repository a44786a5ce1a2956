"""Image token reduction: which patches of each sample stay, drawn by position (never by worker or
rank).

    reduction: {name: random, mask_ratio: 0.5}   FLIP, arXiv:2212.00794
    reduction: {name: grid, window: 2}           one patch of each 2 x 2 window (CLIPA)
    reduction: {name: block, mask_ratio: 0.75}   one square of neighbours (CLIPA)

CLIPA (Li et al., arXiv:2305.07017) also reduces by resizing the image: that is `image_size`. The
class token always stays; nothing is removed in evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Annotated, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from configs import draws
from configs.errors import ConfigError
from configs.registry import Registry

Fraction = Annotated[float, Field(ge=0, lt=1)]
Window = Annotated[int, Field(ge=2)]
Positions = npt.NDArray[np.int64]
Kept = npt.NDArray[np.int16]


class ImageReduction(Protocol):
    """Which of the side x side patches (row by row) of an image stay."""

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

    def num_kept(self, side: int) -> int:
        """Return how many of the side * side patches stay. Raises ConfigError."""
        if side % self.window:
            raise ConfigError(
                f"reduction grid: {side} x {side} patches do not divide into windows of "
                f"{self.window} x {self.window}; choose another window or image_size."
            )
        return (side // self.window) ** 2

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
