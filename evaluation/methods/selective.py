"""Selective classification: how wrong is a model on the images that it is surest of?

    risk(k)   share of wrong predictions among the k most confident images
    AURC      mean of risk(k) over k = 1..n (Geifman and El-Yaniv, arXiv:1705.08500)
    E-AURC    AURC less that of a perfect order with the same accuracy

Confidence is the highest softmax, or, with logit normalization, the margin-like highest logit of
logits divided by their row's p-norm (Cattelan and Silva, arXiv:2305.15508): the p of validation.
Equal confidences share their mean risk, so that the order of images changes nothing.

Legend: n images, C classes, b resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset
from evaluation.methods.registry import Outcome
from evaluation.statistics import AnyMetric, Statistic, number
from evaluation.subject import Subject, has_labels

NORM_POWERS = (2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 8.0)
COVERAGES = tuple(round(0.05 * i, 2) for i in range(1, 21))
FloatArray = npt.NDArray[np.float64]


def normalized_confidence(logit_nC: Tensor, power: float) -> FloatArray:
    """Return the highest of each row's centred logits over its p-norm."""
    centred_nC = logit_nC.double()
    centred_nC = centred_nC - centred_nC.mean(dim=1, keepdim=True)
    length_n = torch.linalg.vector_norm(centred_nC, ord=power, dim=1).clamp(min=1e-12)
    values: FloatArray = (centred_nC.amax(dim=1) / length_n).numpy()
    return values


def risks(confidence_n: FloatArray, wrong_n: FloatArray) -> FloatArray:
    """Return risk(k) for k = 1..n; within a tie the wrong ones are spread evenly."""
    order = np.argsort(-confidence_n, kind="stable")
    sorted_confidence, sorted_wrong = confidence_n[order], wrong_n[order].astype(np.float64)
    starts = np.append(0, np.flatnonzero(np.diff(sorted_confidence)) + 1)
    sizes = np.diff(np.append(starts, len(order)))
    even = np.repeat(np.add.reduceat(sorted_wrong, starts) / sizes, sizes)
    curve: FloatArray = np.cumsum(even) / np.arange(1, len(order) + 1)
    return curve


def aurc(confidence_n: FloatArray, wrong_n: FloatArray) -> float:
    """Return the area under the risk-coverage curve, in [0, 1]; lower is better."""
    return float(risks(confidence_n, wrong_n).mean())


def aurc_resampled(
    confidence_n: FloatArray, wrong_n: FloatArray, count_bn: FloatArray
) -> FloatArray:
    """Return the AURC of each row of counts [b, n]: an image drawn k times stands k times."""
    order = np.argsort(-confidence_n, kind="stable")
    count_bn = count_bn[:, order]
    risk_bn = np.cumsum(count_bn * wrong_n[order], axis=1)
    risk_bn /= np.maximum(np.cumsum(count_bn, axis=1), 1)
    area_b: FloatArray = (count_bn * risk_bn).sum(axis=1) / count_bn.sum(axis=1)
    return area_b


def excess_aurc(confidence_n: FloatArray, wrong_n: FloatArray) -> float:
    """Return the AURC less the best possible one at this accuracy."""
    return aurc(confidence_n, wrong_n) - aurc(-wrong_n.astype(np.float64), wrong_n)


def choose_power(logit_nC: Tensor, wrong_n: FloatArray) -> float:
    """Return the p whose confidence has the lowest AURC (on validation)."""
    return min(NORM_POWERS, key=lambda p: aurc(normalized_confidence(logit_nC, p), wrong_n))


class Selective:
    """Selective classification of zero-shot predictions as the suite runs it."""

    name = "selective"
    splits: tuple[str, ...] = ("train", "val", "test")

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs labels."""
        return has_labels(dataset)

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return AURC of the highest softmax and, with val or train, of normalized logits."""
        logit_nC, label_n = subject.test_logits, subject.split().label_n
        wrong_n = (logit_nC.argmax(dim=1) != label_n).double().numpy()
        msp_n: FloatArray = logit_nC.double().softmax(dim=1).amax(dim=1).numpy()
        metrics = self._metrics(msp_n, wrong_n, "", "confidence: the highest softmax")
        curves = {"softmax": _curve(msp_n, wrong_n)}
        chosen: dict[str, float | str] = {}
        chosen_on = next((s for s in ("val", "train") if s in subject.dataset.splits), None)
        if chosen_on is not None:
            held = subject.labelled(chosen_on)
            held_wrong_n = (held.logit_nC.argmax(dim=1) != held.label_n).double().numpy()
            power = choose_power(held.logit_nC, held_wrong_n)
            chosen = {"power": power, "chosen_on": chosen_on}
            normalized_n = normalized_confidence(logit_nC, power)
            said = f"confidence: the highest logit over the {power:g}-norm, chosen on {chosen_on}"
            metrics += self._metrics(normalized_n, wrong_n, "_normalized", said)
            curves["normalized logits"] = _curve(normalized_n, wrong_n)
        yield Outcome(metrics, self.name, chosen=chosen, shown={"risk_coverage": curves})

    def _metrics(
        self, confidence_n: FloatArray, wrong_n: FloatArray, suffix: str, said: str
    ) -> list[AnyMetric]:
        area = partial(aurc_resampled, confidence_n, wrong_n)
        area_text = f"area under risk over coverage; {said}"
        excess = excess_aurc(confidence_n, wrong_n)
        excess_text = f"AURC less that of a perfect order; {said}"
        return [
            Statistic("aurc" + suffix, area_text, None, len(wrong_n), area),
            number("excess_aurc" + suffix, excess_text, excess, len(wrong_n)),
        ]


def _curve(confidence_n: FloatArray, wrong_n: FloatArray) -> list[tuple[float, float]]:
    risk = risks(confidence_n, wrong_n)
    places = [max(0, round(coverage * len(risk)) - 1) for coverage in COVERAGES]
    return [
        (coverage, float(risk[place])) for coverage, place in zip(COVERAGES, places, strict=True)
    ]
