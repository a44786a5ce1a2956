"""Zero-shot classification: an image gets the nearest class (CLIP, arXiv:2103.00020).

`combine: vectors` lets the model's similarity make one vector of a class's prompts (cosine:
normalize, mean, normalize). `combine: scores` averages the scores of a class's prompts instead, as
in classification by description (Menon and Vondrick, arXiv:2210.07183). The scale changes no
metric here.

Legend: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset
from evaluation.methods.registry import Outcome
from evaluation.ranking import FeatureScores, Scores, blocks, chance, hits, image_standing
from evaluation.statistics import AnyMetric, Metric, Statistic
from evaluation.subject import Subject, has_labels

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
_TIES = "tied classes share the credit"


def accuracies(scores: Scores, labels_n: IntArray, num_classes: int) -> list[Metric]:
    """Return the metrics of scores [n, C]; recall is averaged over classes that have an image."""
    place = image_standing(scores, labels_n, np.arange(num_classes))
    one_n = np.ones(len(labels_n), dtype=np.int64)

    def top(k: int) -> Metric:
        definition = f"share of images whose class is among the {k} nearest; {_TIES}"
        return Metric(f"top{k}", definition, chance(one_n, num_classes, k), hits(place, k))

    recall = Metric(
        "mean_per_class_recall",
        f"top1 within each class, mean over the classes that have an image; {_TIES}",
        1 / num_classes,
        hits(place, 1),
        labels_n,
    )
    return [top(1), *([top(5)] if num_classes >= 5 else []), recall]


def average_precisions(score_nC: FloatArray, is_right_nC: BoolArray) -> FloatArray:
    """Return the average precision of each class [C], for images with several labels (VOC2007).

    AP = sum over right images of precision at their rank / max(number of right images, 1): no
    interpolation (CLIP_benchmark). Equal scores keep the order of the images.
    """
    order_nC = np.argsort(-score_nC, axis=0, kind="stable")
    right_nC = np.take_along_axis(is_right_nC, order_nC, axis=0)
    precision_nC = np.cumsum(right_nC, axis=0) / np.arange(1, len(right_nC) + 1)[:, None]
    total_C: FloatArray = (precision_nC * right_nC).sum(axis=0)
    mean_C: FloatArray = total_C / np.maximum(right_nC.sum(axis=0), 1)
    return mean_C


def f1_macro(guess_n: IntArray, label_n: IntArray, num_classes: int) -> Statistic:
    """Return the mean over the classes that have an image of 2 TP / (2 TP + FP + FN).

    A class that is only guessed does not count, as in WILDS (arXiv:2012.07421) and Dassl.
    """

    def one_hot(index_n: IntArray) -> FloatArray:
        rows = np.zeros((len(index_n), num_classes))
        rows[np.arange(len(index_n)), index_n] = 1
        return rows

    guessed_nC, labelled_nC = one_hot(guess_n), one_hot(label_n)
    both_nC, size_C = guessed_nC * labelled_nC, labelled_nC.sum(axis=0)
    has_image_C = size_C > 0
    sum_nC = guessed_nC + labelled_nC

    def value(count_bn: FloatArray) -> FloatArray:
        total_bC = count_bn @ sum_nC
        f1_bC = np.divide(
            2 * (count_bn @ both_nC), total_bC, out=np.zeros_like(total_bC), where=total_bC > 0
        )
        # A class counts as often as its images were drawn: once, but where strata are collapsed.
        weight_bC = (count_bn @ labelled_nC)[:, has_image_C] / size_C[has_image_C]
        mean: FloatArray = (weight_bC * f1_bC[:, has_image_C]).sum(axis=1) / weight_bC.sum(axis=1)
        return mean

    definition = "mean over classes with an image of 2 TP / (2 TP + FP + FN), by the nearest class"
    return Statistic(
        "f1_macro", definition, None, len(label_n), value, strata_n=label_n, is_shifted=True
    )


class MatrixScores:
    """Scores that are there as a matrix [n, C]."""

    def __init__(self, score_nC: Tensor) -> None:
        self._score_nC = score_nC
        self.num_images, self.num_texts = score_nC.shape

    def image_rows(self, start: int, stop: int) -> Tensor:
        """Return the scores of images start..stop."""
        return self._score_nC[start:stop]

    def text_rows(self, start: int, stop: int) -> Tensor:
        """Return the scores of texts start..stop."""
        return self._score_nC[:, start:stop].T


class ZeroShot:
    """Zero-shot classification as the suite runs it."""

    name = "zero_shot"
    splits: tuple[str, ...] = ("test",)

    def __init__(self, combine: Literal["vectors", "scores"]) -> None:
        self.combine = combine

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs classes and labels."""
        return has_labels(dataset)

    def _scores(self, subject: Subject) -> FeatureScores | MatrixScores:
        if self.combine == "vectors":
            return subject.scores()
        similarity = subject.similarity
        image_nD = similarity.embed_image(subject.split().raw_nD)
        own = [
            similarity.scores(image_nD, similarity.embed_text(raw_TD)).mean(dim=1)
            for raw_TD in subject.prompt_features()
        ]
        return MatrixScores(torch.stack(own, dim=1))

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return accuracies, recall and F1; the confusion matrix for the report."""
        label_n = subject.split().part.labels()
        num_classes = len(subject.dataset.class_names)
        scores = self._scores(subject)
        guess_n = torch.cat(
            [scores.image_rows(a, b).argmax(dim=1) for a, b in blocks(len(label_n), num_classes)]
        ).numpy()
        metrics: list[AnyMetric] = [
            *accuracies(scores, label_n, num_classes),
            f1_macro(guess_n, label_n, num_classes),
        ]
        method = self.name if self.combine == "vectors" else "zero_shot_scores"
        yield Outcome(
            metrics, method, shown=confusion(guess_n, label_n, subject.dataset.class_names)
        )


MAX_SHOWN_CLASSES = 40


def confusion(
    guess_n: IntArray, label_n: IntArray, class_names: tuple[str, ...]
) -> dict[str, object]:
    """Return per-class recall and the most confused pairs; the whole matrix where it is small."""
    num_classes = len(class_names)
    cell, count = np.unique(label_n * num_classes + guess_n, return_counts=True)
    size_C = np.bincount(label_n, minlength=num_classes)
    right_C = np.bincount(label_n[guess_n == label_n], minlength=num_classes)
    per_class = [
        [name, int(right), int(size)]
        for name, right, size in zip(class_names, right_C, size_C, strict=True)
        if size
    ]
    wrong = [
        (int(c), *divmod(int(k), num_classes))
        for k, c in zip(cell, count, strict=True)
        if k // num_classes != k % num_classes
    ]
    pairs = [
        [class_names[a], class_names[b], c] for c, a, b in sorted(wrong, key=lambda w: (-w[0], w))
    ]
    shown: dict[str, object] = {"per_class": per_class, "confused": pairs[:20]}
    if num_classes <= MAX_SHOWN_CLASSES:
        matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(matrix, (label_n, guess_n), 1)
        shown["matrix"] = {"classes": list(class_names), "counts": matrix.tolist()}
    return {"confusion": shown}
