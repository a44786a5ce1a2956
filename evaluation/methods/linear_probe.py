"""Linear probe: L2-regularized logistic regression on features, C chosen on validation.

Solver: scikit-learn's L-BFGS, max_iter 1000 (CLIP, arXiv:2103.00020, A.3). Two published searches:
    openai   C in 10^{-6,-4,...,6}, then halve the step around the peak until 8 steps a decade;
             the final fit is on train and validation together
    coop     C in 10^{6,4,...,-6}, peak, then 8 bisections of [peak / 10, peak * 10] in log10 C,
             keeping the better side (ties: the lower); the final fit is on train alone

With unit-length features the useful C lies between 10 and 10^4.

Legend: n images, C classes, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from configs.errors import DataError
from evaluation.dataset import EvaluationDataset
from evaluation.methods.registry import CSearch, Outcome
from evaluation.methods.zero_shot import MatrixScores, accuracies
from evaluation.subject import Subject, held_out, needs

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
MAX_ITERATIONS = 1000
STEPS_A_DECADE = 8
_LIMIT = 6 * STEPS_A_DECADE  # C from 1e-6 to 1e6
_BISECTIONS = 8


def fit(feature_nD: FloatArray, label_n: IntArray, c: float) -> LogisticRegression:
    """Return the fitted classifier; the labels must be of at least two classes."""
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, random_state=0)
    with warnings.catch_warnings():
        # At C = 1e6 the separable few-shot problem has no finite optimum: 1000 steps are the method
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(feature_nD, label_n)


def log_c(step: int) -> float:
    """Return C of a step of the fine grid, 8 steps a decade around C = 1."""
    return float(10.0 ** (step / STEPS_A_DECADE))


def search_openai(accuracy_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the best C and every accuracy that was measured; the smallest C wins ties."""
    found: dict[int, float] = {}

    def measure(step: int) -> float:
        if step not in found:
            found[step] = accuracy_at(log_c(step))
        return found[step]

    width = 2 * STEPS_A_DECADE
    peak = max(range(-_LIMIT, _LIMIT + 1, width), key=measure)
    while width > 1:
        width //= 2
        around = [s for s in (peak - width, peak, peak + width) if abs(s) <= _LIMIT]
        peak = max(around, key=lambda step: (measure(step), -step))
    return log_c(peak), {log_c(step): value for step, value in sorted(found.items())}


def search_coop(accuracy_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the best C and every accuracy that was measured."""
    found: dict[float, float] = {}

    def measure(c: float) -> float:
        if c not in found:
            found[c] = accuracy_at(c)
        return found[c]

    peak = max((10.0**power for power in range(6, -7, -2)), key=measure)
    left, right = 0.1 * peak, 10 * peak
    for _ in range(_BISECTIONS):
        middle = 10 ** ((np.log10(left) + np.log10(right)) / 2)
        if measure(left) >= measure(right):
            right = middle
        else:
            left = middle
    return (left if measure(left) >= measure(right) else right), found


SEARCHES = {"openai": search_openai, "coop": search_coop}


class LinearProbe:
    """The linear probe as the suite runs it, on embedded image features."""

    name = "linear_probe"
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(self, search: CSearch, validation: float) -> None:
        self.search = search
        self.validation = validation

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs labels and a train split."""
        return needs(dataset, "train")

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Choose C on validation, fit, and return the accuracies on test."""

        def split(name: str) -> tuple[FloatArray, IntArray]:
            data = subject.split(name)
            return subject.similarity.embed_image(data.raw_nD).numpy(), data.part.labels()

        train_x, train_y = split("train")
        if "val" in subject.dataset.splits:
            val_x, val_y = split("val")
        else:
            fitted, out = held_out(torch.from_numpy(train_y), self.validation, subject.seed)
            train_x, train_y, val_x, val_y = (
                *(train_x[fitted], train_y[fitted]),
                *(train_x[out], train_y[out]),
            )
            if not len(out) or len(np.unique(train_y)) < 2:
                raise DataError(
                    f"{subject.dataset.name}: linear_probe has {len(out)} of "
                    f"{len(out) + len(fitted)} train images held out (validation="
                    f"{self.validation:g}) and fits the others, of {len(np.unique(train_y))} "
                    "classes; expected at least one image to validate by, and two classes. Give "
                    "the dataset a val split, or set another `validation` of the method."
                )
        c, _ = SEARCHES[self.search](lambda c: float(fit(train_x, train_y, c).score(val_x, val_y)))
        if self.search == "openai":
            train_x, train_y = np.concatenate([train_x, val_x]), np.concatenate([train_y, val_y])
        model = fit(train_x, train_y, c)
        test_x, test_y = split("test")
        score_nK = np.asarray(model.decision_function(test_x))
        if score_nK.ndim == 1:  # two classes: one column
            score_nK = np.stack([-score_nK, score_nK], axis=1)
        num_classes = len(subject.dataset.class_names)
        score_nC = np.full((len(test_x), num_classes), -np.inf)
        score_nC[:, model.classes_] = score_nK
        scores = MatrixScores(torch.from_numpy(score_nC))
        metrics = accuracies(scores, test_y, num_classes)
        yield Outcome(metrics, self.name, chosen={"c": c, "search": self.search})
