"""Image token reduction: which patches of each sample stay, drawn by position (never by worker or
rank).

FLIP (Li et al., arXiv:2212.00794): keep int(L * (1 - mask_ratio)) patches chosen uniformly without
replacement, a new draw a sample; the class token always stays; nothing is removed in evaluation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from configs import draws


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """Return how many patches stay when the fraction `mask_ratio` is removed, at least 1."""
    return max(1, int(num_patches * (1.0 - mask_ratio)))


def random_patches(
    seed: int, positions: npt.NDArray[np.int64], num_patches: int, mask_ratio: float
) -> npt.NDArray[np.int16]:
    """Return the kept patches [b, K], ascending, of the samples at global `positions` [b]."""
    keys = draws.bits(seed, "reduction/random", positions[:, None], np.arange(num_patches)[None, :])
    kept = np.argsort(keys, axis=1, kind="stable")[:, : num_kept_patches(num_patches, mask_ratio)]
    return np.sort(kept, axis=1).astype(np.int16)
