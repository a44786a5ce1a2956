"""Out-of-distribution metrics. In-distribution (ID) is positive, a higher score is more ID.

FPR95 has four definitions that differ on small sets; the default is ViM's, and a row says which:
    vim      threshold = the floor(0.95 n)-th highest ID score; OOD >= it        (haoqiwang/vim)
    knn_ood  threshold = the round(0.05 n)-th lowest ID score; OOD > it          (knn-ood)
    mcm      the distinct threshold whose recall is closest to 0.95; OOD >= it   (MCM)
    clipn    linear interpolation of the ROC at recall 0.95                      (CLIPN)
AUPR is the area by trapezoids (ViM) or the average precision (MCM).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
RECALL = 0.95


def auroc(id_n: FloatArray, ood_m: FloatArray) -> float:
    """Return P(ID above OOD), ties counted half."""
    below = np.searchsorted(np.sort(ood_m), id_n, side="left")
    not_above = np.searchsorted(np.sort(ood_m), id_n, side="right")
    return float((below + not_above).sum() / (2 * len(id_n) * len(ood_m)))


def curve(id_n: FloatArray, ood_m: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the distinct thresholds, descending, with ID and OOD counted at or above each."""
    score = np.concatenate([id_n, ood_m])
    is_id = np.concatenate([np.ones(len(id_n)), np.zeros(len(ood_m))])
    order = np.argsort(-score, kind="stable")
    score, is_id = score[order], is_id[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    hits = np.cumsum(is_id)[last]
    return score[last], hits, last + 1 - hits


def aupr_trapezoid(positive_n: FloatArray, negative_m: FloatArray) -> float:
    """Return the area under precision over recall by trapezoids, from (recall 0, precision 1)."""
    _, hits, false = curve(positive_n, negative_m)
    end = int(np.argmax(hits >= len(positive_n))) + 1  # beyond full recall there is no area
    precision = np.append(1.0, (hits / (hits + false))[:end])
    recall = np.append(0.0, hits[:end] / len(positive_n))
    return float(np.trapezoid(precision, recall))


def average_precision(positive_n: FloatArray, negative_m: FloatArray) -> float:
    """Return the sum of precision times the step in recall."""
    _, hits, false = curve(positive_n, negative_m)
    step = np.diff(np.append(0.0, hits)) / len(positive_n)
    return float((step * hits / (hits + false)).sum())


def fpr95_vim(id_n: FloatArray, ood_m: FloatArray) -> float:
    """Return the false positive rate at ViM's threshold."""
    place = max(1, int(RECALL * len(id_n)))
    return float((ood_m >= np.sort(id_n)[-place]).mean())


def fpr95_knn_ood(id_n: FloatArray, ood_m: FloatArray) -> float:
    """Return the false positive rate at knn-ood's threshold, strictly above it."""
    place = min(round((1 - RECALL) * len(id_n)), len(id_n) - 1)
    return float((ood_m > np.sort(id_n)[place]).mean())


def fpr95_mcm(id_n: FloatArray, ood_m: FloatArray) -> float:
    """Return the false positive rate where recall is closest to 0.95, the higher recall first."""
    _, hits, false = curve(id_n, ood_m)
    distance = np.abs(hits / len(id_n) - RECALL)
    cut = len(distance) - 1 - int(np.argmin(distance[::-1]))
    return float(false[cut] / len(ood_m))


def fpr95_clipn(id_n: FloatArray, ood_m: FloatArray) -> float:
    """Return the ROC's false positive rate at recall 0.95, by linear interpolation."""
    _, hits, false = curve(id_n, ood_m)
    recall = np.append(0.0, hits / len(id_n))
    return float(np.interp(RECALL, recall, np.append(0.0, false / len(ood_m))))


FPR95: dict[str, Callable[[FloatArray, FloatArray], float]] = {
    "vim": fpr95_vim,
    "knn_ood": fpr95_knn_ood,
    "mcm": fpr95_mcm,
    "clipn": fpr95_clipn,
}
