"""MaNo: how accurate a model is on data without labels (Xie et al., arXiv:2405.18979).

    delta = mean CE(softmax(q), uniform) = -1/(N C) sum log softmax(q)
    v = softmax(q) where delta > 5 (confident), else 1 + q + q^2 / 2 - its row's minimum
    S = (mean |v / |v|_1|^p)^(1/p), p = 4, of each batch, then the mean over batches

The published code decides by the last of the first five batches; by default delta is of all here
(`compat: published`: the last of the first five).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset
from evaluation.methods.registry import Compat, Outcome
from evaluation.statistics import number
from evaluation.subject import Subject, has_labels

FloatArray = npt.NDArray[np.float64]
POWER = 4
THRESHOLD = 5.0
BATCH_ROWS = 128
_NUM_FIRST = 5


def divergence(logit_nC: Tensor) -> float:
    """Return delta: the mean cross entropy of softmax(q) to the uniform distribution, in nats."""
    return float(-logit_nC.log_softmax(dim=1).mean())


def delta_of(batches: Sequence[Tensor], *, published: bool) -> float:
    """Return delta of all rows; as published, of the last of the first five batches."""
    if published:
        return divergence(batches[:_NUM_FIRST][-1])
    return divergence(torch.cat(list(batches)))


def score(batches: Sequence[Tensor], delta: float, power: int = POWER) -> float:
    """Return S in [1 / C, 1]: higher for a model that is more often right."""
    return float(np.mean([_batch_score(batch, delta, power) for batch in batches]))


def _batch_score(logit_nC: Tensor, delta: float, power: int) -> float:
    if delta > THRESHOLD:
        v_nC = logit_nC.softmax(dim=1)
    else:
        v_nC = 1 + logit_nC + logit_nC**2 / 2
        v_nC = v_nC - v_nC.amin(dim=1, keepdim=True)
    v_nC = torch.nn.functional.normalize(v_nC, p=1, dim=1)
    return float((v_nC.abs() ** power).mean() ** (1 / power))


def agreement(score_k: FloatArray, accuracy_k: FloatArray) -> tuple[float, float]:
    """Return R^2 of the least-squares line, and Spearman's rho, over k shifted sets."""
    if len(score_k) < 3 or np.ptp(score_k) == 0 or np.ptp(accuracy_k) == 0:
        return float("nan"), float("nan")

    def rank(values: FloatArray) -> FloatArray:  # ties share the mean rank
        lower = np.searchsorted(np.sort(values), values, side="left")
        upper = np.searchsorted(np.sort(values), values, side="right")
        return (lower + upper) / 2

    r = np.corrcoef(score_k, accuracy_k)[0, 1]
    rho = np.corrcoef(rank(score_k), rank(accuracy_k))[0, 1]
    return float(r**2), float(rho)


class Mano:
    """MaNo of zero-shot logits as the suite runs it; the labels are not used."""

    name = "mano"
    splits: tuple[str, ...] = ("test",)

    def __init__(self, power: int, compat: Compat) -> None:
        self.power = power
        self.compat = compat

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs classes."""
        return has_labels(dataset)

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the score; whether it follows accuracy shows over several shifted sets."""
        batches = torch.split(subject.test_logits, BATCH_ROWS)
        delta = delta_of(batches, published=self.compat == "published")
        value = score(batches, delta, self.power)
        said = "softmax" if delta > THRESHOLD else "second-order Taylor"
        definition = (
            f"MaNo, p = {self.power}, batches of {BATCH_ROWS}, by {said}; delta {delta:.4g}"
        )
        found = number("mano_score", definition, value, len(subject.test_logits))
        yield Outcome([found], self.name, chosen={"delta": delta}, compat=self.compat)
