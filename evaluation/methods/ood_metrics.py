"""Out-of-distribution metrics. In-distribution (ID) is positive, a higher score is more ID.

FPR95 has four definitions that differ on small sets; the default is ViM's, and a row says which:
    vim      threshold = the floor(0.95 n)-th highest ID score; OOD >= it        (haoqiwang/vim)
    knn_ood  threshold = the round(0.05 n)-th lowest ID score; OOD > it          (knn-ood)
    mcm      the distinct threshold whose recall is closest to 0.95; OOD >= it   (MCM)
    clipn    linear interpolation of the ROC at recall 0.95                      (CLIPN)
AUPR is the area by trapezoids (ViM) or the average precision (MCM).

Every metric is a function of how many ID and OOD images stand at or above each threshold, so that
resamples (counts of images) and the images themselves go through the same lines.

Legend: n ID images, m OOD images, t distinct thresholds (descending), b resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
RECALL = 0.95
_ROUNDING = 1e-6  # counts of resamples are multiples of n / (n - 1)


class Standings:
    """ID and OOD scores in one order, and what stands at or above each threshold."""

    def __init__(self, id_n: FloatArray, ood_m: FloatArray) -> None:
        score = np.concatenate([id_n, ood_m])
        self._order = np.argsort(-score, kind="stable")
        score = score[self._order]
        self._last_t = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
        self._is_id = (np.arange(len(score)) < len(id_n))[self._order]
        self._last_counts: tuple[FloatArray, Counts] | None = None
        self.set_n = np.repeat([0, 1], [len(id_n), len(ood_m)])  # ID and OOD are drawn apart

    def counted(self, count_bn: FloatArray) -> Counts:
        """Return the standings of counts of ID then OOD images [b, n + m]; the last are kept."""
        if self._last_counts is None or self._last_counts[0] is not count_bn:
            count_bn_sorted = count_bn[:, self._order]
            above_bt = np.cumsum(count_bn_sorted, axis=1)[:, self._last_t]
            hits_bt = np.cumsum(count_bn_sorted * self._is_id, axis=1)[:, self._last_t]
            self._last_counts = (count_bn, Counts(hits_bt, above_bt - hits_bt))
        return self._last_counts[1]

    def once(self) -> Counts:
        """Return the standings of every image once [1, t]."""
        return self.counted(np.ones((1, len(self._order))))


@dataclass(frozen=True)
class Counts:
    """ID and OOD images at or above each threshold [b, t]."""

    hits_bt: FloatArray
    false_bt: FloatArray

    @cached_property
    def recall_bt(self) -> FloatArray:
        """The share of ID images at or above each threshold, after 0 [b, 1 + t]."""
        return _from_zero(self.hits_bt / self.hits_bt[:, -1:])

    @cached_property
    def false_rate_bt(self) -> FloatArray:
        """The share of OOD images at or above each threshold, after 0 [b, 1 + t]."""
        return _from_zero(self.false_bt / self.false_bt[:, -1:])

    @cached_property
    def precision_bt(self) -> FloatArray:
        """The share of ID images among those at or above each threshold, after 1 [b, 1 + t]."""
        above_bt = self.hits_bt + self.false_bt
        none = np.ones_like(above_bt)  # of no image
        return _from_zero(np.divide(self.hits_bt, above_bt, out=none, where=above_bt > 0), 1.0)


def _from_zero(value_bt: FloatArray, first: float = 0.0) -> FloatArray:
    return np.concatenate([np.full((len(value_bt), 1), first), value_bt], axis=1)


def auroc(counts: Counts) -> FloatArray:
    """Return P(ID above OOD), ties counted half [b]."""
    return np.asarray(np.trapezoid(counts.recall_bt, counts.false_rate_bt, axis=1))


def aupr_trapezoid(counts: Counts) -> FloatArray:
    """Return the area under precision over recall by trapezoids, from (recall 0, precision 1)."""
    return np.asarray(np.trapezoid(counts.precision_bt, counts.recall_bt, axis=1))


def average_precision(counts: Counts) -> FloatArray:
    """Return the sum of precision times the step in recall [b]."""
    step_bt = np.diff(counts.recall_bt, axis=1)
    total: FloatArray = (step_bt * counts.precision_bt[:, 1:]).sum(axis=1)
    return total


def _rate_at(counts: Counts, place_b: IntArray) -> FloatArray:
    return np.take_along_axis(counts.false_rate_bt, place_b[:, None], axis=1)[:, 0]


def _first_with(counts: Counts, wanted_b: FloatArray) -> IntArray:
    """Return the first threshold (1-based) with at least so many ID images at or above it."""
    enough_bt = counts.hits_bt >= wanted_b[:, None] - _ROUNDING
    place_b: IntArray = 1 + enough_bt.argmax(axis=1)
    return place_b


def fpr95_vim(counts: Counts) -> FloatArray:
    """Return the false positive rate at ViM's threshold [b]."""
    n_b = counts.hits_bt[:, -1]
    return _rate_at(counts, _first_with(counts, np.maximum(1, np.floor(RECALL * n_b + _ROUNDING))))


def fpr95_knn_ood(counts: Counts) -> FloatArray:
    """Return the false positive rate at knn-ood's threshold, strictly above it [b]."""
    n_b = counts.hits_bt[:, -1]
    place_b = np.minimum(np.rint((1 - RECALL) * n_b), n_b - 1)
    return _rate_at(counts, _first_with(counts, n_b - place_b) - 1)


def fpr95_mcm(counts: Counts) -> FloatArray:
    """Return the false positive rate where recall is closest to 0.95, the higher recall first."""
    distance_bt = np.abs(counts.recall_bt[:, 1:] - RECALL)
    place_b = distance_bt.shape[1] - distance_bt[:, ::-1].argmin(axis=1)
    return _rate_at(counts, place_b)


def fpr95_clipn(counts: Counts) -> FloatArray:
    """Return the ROC's false positive rate at recall 0.95, by linear interpolation [b]."""
    after_b = (counts.recall_bt > RECALL).argmax(axis=1)
    ends = np.stack([after_b - 1, after_b], axis=1)
    recall_b2 = np.take_along_axis(counts.recall_bt, ends, axis=1)
    rate_b2 = np.take_along_axis(counts.false_rate_bt, ends, axis=1)
    share_b = (RECALL - recall_b2[:, 0]) / (recall_b2[:, 1] - recall_b2[:, 0])
    rate: FloatArray = rate_b2[:, 0] + share_b * (rate_b2[:, 1] - rate_b2[:, 0])
    return rate


FPR95: dict[str, Callable[[Counts], FloatArray]] = {
    "vim": fpr95_vim,
    "knn_ood": fpr95_knn_ood,
    "mcm": fpr95_mcm,
    "clipn": fpr95_clipn,
}
