"""Worst-group accuracy: the accuracy within each group, the lowest of them, and the gap.

A group is a pair (label, attribute) or an attribute alone; a group without an image does not count
(perceptionCLIP's code gives it 0). Waterbirds papers weigh the average by the groups' training
frequency: `adjusted_average` does, where the dataset has a train split.

Legend: n images, G groups, b resamples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def group_accuracies(
    correct_n: FloatArray, group_n: IntArray, num_groups: int, count_bn: FloatArray
) -> FloatArray:
    """Return the accuracy of each group [b, G] for counts of images [b, n]; NaN where empty."""
    member_nG = np.zeros((len(group_n), num_groups))
    member_nG[np.arange(len(group_n)), group_n] = 1
    size_bG = count_bn @ member_nG
    hits_bG = count_bn @ (member_nG * correct_n[:, None])
    with np.errstate(invalid="ignore"):
        share: FloatArray = np.where(size_bG > 0, hits_bG / size_bG, np.nan)
    return share


def adjusted_average(accuracy_G: FloatArray, train_count_G: FloatArray) -> float:
    """Return the mean of the groups' accuracies, weighted by their frequency in training."""
    known = ~np.isnan(accuracy_G) & (train_count_G > 0)
    return float(np.average(accuracy_G[known], weights=train_count_G[known]))
