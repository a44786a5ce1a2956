"""Local outlier scores of vectors in one batch: how far a sample lies from its neighbours.

The detectors of H. Huang et al., "Detecting Backdoor Samples in Contrastive Language Image
Pretraining" (ICLR 2025, arXiv:2502.01385): the image vectors of poisoned pairs lie apart, with
neighbourhoods far sparser than those of clean ones, as long as fewer than k of them are in a batch.
With a_1 <= ... <= a_k the distances of a sample to its k nearest in the batch, itself left out,
nn_1 ... nn_k those, and kdist = a_k:

    kdist   a_k
    lid     mle: -k / sum_{i<k} log(a_i / a_k + 1e-4)
            mom: m / (a_k - m), m the mean of a_1 ... a_k
    slof    mean_j a_k(x) / kdist(nn_j)                        simplified local outlier factor
    dao     mean_j lid(nn_j) * log(a_k(x) / kdist(nn_j))       dimension-aware outlier

Higher is more suspicious; what is not finite (all neighbours at distance 0) is 1000, as in the
authors' code. There a sample as a query is compared with its neighbour k + 1 and its neighbours
with their neighbour k, since the lists of the ones leave the sample out and those of the others do
not; here both are neighbour k. Distances are Euclidean between unit vectors, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from curation.selectors.cosines import Float64Array, IntArray

Detector = Literal["kdist", "lid", "slof", "dao"]
Estimator = Literal["mle", "mom"]
NOT_FINITE = 1000.0
_LOG_FLOOR = 1e-4
_ELEMENTS_AT_ONCE = 1 << 22
# Squared distances below are taken for 0: rounding makes up to 1e-15 of those of equal vectors.
_EQUAL = 1e-14


def neighbours(vectors: npt.NDArray[np.float16], k: int) -> tuple[IntArray, Float64Array]:
    """Return the k nearest of each row, itself left out, and their distances: both [n, k].

    Nearest first, of equally near ones the first row. k < n.
    """
    num = len(vectors)
    exact = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", exact, exact))
    found, distances = np.empty((num, k), np.int64), np.empty((num, k))
    step = max(1, _ELEMENTS_AT_ONCE // num)
    for start in range(0, num, step):
        rows = np.arange(start, min(start + step, num))
        cosines = exact[rows] @ exact.T / (norms[rows, None] * norms[None, :])
        squares = 2 - 2 * cosines
        squares[squares < _EQUAL] = 0
        squares[np.arange(len(rows)), rows] = np.inf
        found[rows] = _smallest(squares, k)
        distances[rows] = np.sqrt(np.take_along_axis(squares, found[rows], axis=1))
    return found, distances


def _smallest(values: Float64Array, k: int) -> IntArray:
    """Return the columns of the k smallest of each row, in order, the first of equals first."""
    last = np.partition(values, k - 1, axis=1)[:, k - 1]
    row, column = np.nonzero(values <= last[:, None])
    order = np.lexsort((column, values[row, column], row))
    place = np.arange(len(row)) - np.searchsorted(row, row)  # within its row
    return column[order][place < k].reshape(len(values), k).astype(np.int64)


def lid(distances: Float64Array, estimator: Estimator) -> Float64Array:
    """Return the local intrinsic dimension from the distances [n, k] to neighbours: [n]."""
    k = distances.shape[1]
    farthest = distances[:, -1]
    if estimator == "mom":
        mean = distances.mean(axis=1)
        found: Float64Array = mean / (farthest - mean)
    else:
        logs = np.log(distances[:, :-1] / farthest[:, None] + _LOG_FLOOR)
        found = -k / logs.sum(axis=1)
    return found


def _slof(found: IntArray, distances: Float64Array, estimator: Estimator) -> Float64Array:
    farthest = distances[:, -1]
    score: Float64Array = (farthest[:, None] / farthest[found]).mean(axis=1)
    return score


def _dao(found: IntArray, distances: Float64Array, estimator: Estimator) -> Float64Array:
    farthest = distances[:, -1]
    ratios = np.log(farthest[:, None] / farthest[found])
    score: Float64Array = (lid(distances, estimator)[found] * ratios).mean(axis=1)
    return score


_DETECTORS: dict[str, Callable[[IntArray, Float64Array, Estimator], Float64Array]] = {
    "kdist": lambda found, distances, estimator: distances[:, -1].copy(),
    "lid": lambda found, distances, estimator: lid(distances, estimator),
    "slof": _slof,
    "dao": _dao,
}


def scores(
    vectors: npt.NDArray[np.float16], detector: Detector, *, k: int, estimator: Estimator
) -> Float64Array:
    """Return the outlier score of each vector of a batch [n, D], n > k: [n], all finite."""
    found, distances = neighbours(vectors, k)
    with np.errstate(divide="ignore", invalid="ignore"):
        raw = _DETECTORS[detector](found, distances, estimator)
    raw[~np.isfinite(raw)] = NOT_FINITE
    return raw
