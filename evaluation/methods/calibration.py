"""Calibration: does a confidence of 70 % mean right in 70 % of the cases?

    ECE            B equal bins (low, high] of the highest softmax: sum n_b / N |accuracy_b - mean
                   confidence_b|, over the whole set (Guo et al., arXiv:1706.04599)
    adaptive ECE   the same over B bins of equally many images (Nixon et al., 2019)
    Brier          mean sum_c (p_c - y_c)^2, in [0, 2];  NLL  mean -log p_y, in nats
    temperature    one number T, fitted by NLL on validation; logits / T

Legend: n images, C classes, B bins.
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
from evaluation.statistics import AnyMetric, Metric, Statistic
from evaluation.subject import Subject, has_labels

NUM_BINS = 15
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def confidences(logit_nC: Tensor, label_n: Tensor) -> tuple[FloatArray, FloatArray]:
    """Return the highest probability of each image, and 1 where it is the label's (else 0)."""
    top = logit_nC.softmax(dim=1).max(dim=1)
    return top.values.double().numpy(), (top.indices == label_n).double().numpy()


def equal_width_bins(confidence_n: FloatArray, num_bins: int = NUM_BINS) -> IntArray:
    """Return the bin of each confidence; a bin is (low, high], 0 itself is in none (-1)."""
    # Not i / B: a confidence of float32 must meet the same edges as in the published code.
    edges = torch.linspace(0, 1, num_bins + 1).double().numpy()
    return np.searchsorted(edges, confidence_n, side="left") - 1


def equal_mass_bins(confidence_n: FloatArray, num_bins: int = NUM_BINS) -> IntArray:
    """Return the bin of each confidence, in B bins of equally many images."""
    rank_n = np.empty(len(confidence_n), dtype=np.int64)
    rank_n[np.argsort(confidence_n, kind="stable")] = np.arange(len(confidence_n))
    return rank_n * num_bins // max(len(confidence_n), 1)


def calibration_error(
    confidence_n: FloatArray, correct_n: FloatArray, bin_n: IntArray, count_bn: FloatArray
) -> FloatArray:
    """Return the expected calibration error for each row of counts [b, n] of the images."""
    kept = bin_n >= 0
    num_bins = int(bin_n.max(initial=0)) + 1
    member_nB = np.zeros((len(bin_n), num_bins))
    member_nB[np.flatnonzero(kept), bin_n[kept]] = (correct_n - confidence_n)[kept]
    error_b: FloatArray = np.abs(count_bn @ member_nB).sum(axis=1) / count_bn.sum(axis=1)
    return error_b


def ece(confidence_n: FloatArray, correct_n: FloatArray, bin_n: IntArray) -> float:
    """Return the expected calibration error over given bins."""
    once = np.ones((1, len(confidence_n)))
    return float(calibration_error(confidence_n, correct_n, bin_n, once)[0])


def brier(logit_nC: Tensor, label_n: Tensor) -> FloatArray:
    """Return sum_c (p_c - y_c)^2 of each image."""
    p_nC = logit_nC.double().softmax(dim=1)
    p_nC[torch.arange(len(p_nC)), label_n] -= 1
    values: FloatArray = (p_nC**2).sum(dim=1).numpy()
    return values


def nll(logit_nC: Tensor, label_n: Tensor) -> FloatArray:
    """Return -log p_y of each image, in nats."""
    loss = torch.nn.functional.cross_entropy(logit_nC.double(), label_n, reduction="none")
    values: FloatArray = loss.numpy()
    return values


def fit_temperature(logit_nC: Tensor, label_n: Tensor, *, max_iterations: int = 200) -> float:
    """Return the T that minimizes the NLL of logits / T (log T, L-BFGS, at most 200 steps)."""
    logit_nC = logit_nC.double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_t], lr=1.0, max_iter=max_iterations, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logit_nC * torch.exp(-log_t), label_n)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log_t.detach().clamp(-9.0, 9.0).exp())


class Calibration:
    """Calibration of zero-shot probabilities as the suite runs it."""

    name = "calibration"
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs labels."""
        return has_labels(dataset)

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the errors as they are and, where there is a val or train split, calibrated."""
        label_n = subject.split().label_n
        scale = f"logit scale {subject.scale:.6g}"
        metrics = self._metrics(subject.test_logits, label_n, "", scale)
        chosen: dict[str, float | str] = {"logit_scale": round(subject.scale, 6)}
        fitted_on = next((s for s in ("val", "train") if s in subject.dataset.splits), None)
        if fitted_on is not None:
            held = subject.labelled(fitted_on)
            temperature = fit_temperature(held.logit_nC, held.label_n)
            chosen |= {"temperature": round(temperature, 6), "fitted_on": fitted_on}
            said = f"after a temperature fitted on {fitted_on}"
            metrics += self._metrics(subject.test_logits / temperature, label_n, "_tempered", said)
        yield Outcome(metrics, self.name, chosen=chosen, shown=self._shown(subject, label_n))

    def _metrics(
        self, logit_nC: Tensor, label_n: Tensor, suffix: str, said: str
    ) -> list[AnyMetric]:
        confidence_n, correct_n = confidences(logit_nC, label_n)
        found: list[AnyMetric] = []
        for name, bins in (("ece", equal_width_bins), ("adaptive_ece", equal_mass_bins)):
            bin_n = bins(confidence_n, self.num_bins)
            kind = "equal width" if name == "ece" else "equal mass"
            definition = f"expected calibration error, {self.num_bins} bins of {kind}; {said}"
            function = partial(calibration_error, confidence_n, correct_n, bin_n)
            found.append(
                Statistic(name + suffix, definition, None, len(label_n), function, is_shifted=True)
            )
        definition = f"mean squared error of probabilities, in [0, 2]; {said}"
        found.append(Metric("brier" + suffix, definition, None, brier(logit_nC, label_n)))
        definition = f"mean negative log likelihood, nats; {said}"
        found.append(Metric("nll" + suffix, definition, None, nll(logit_nC, label_n)))
        return found

    def _shown(self, subject: Subject, label_n: Tensor) -> dict[str, object]:
        confidence_n, correct_n = confidences(subject.test_logits, label_n)
        bin_n = equal_width_bins(confidence_n, self.num_bins)
        rows = [
            [float(confidence_n[own].mean()), float(correct_n[own].mean()), int(own.sum())]
            for own in (bin_n == b for b in range(self.num_bins))
            if own.any()
        ]
        return {"reliability": rows}
