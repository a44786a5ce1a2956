"""Zero-shot classification: an image gets the nearest class (CLIP, arXiv:2103.00020).

Class vectors come from features.class_vectors; the scale of the scores changes no metric here.

Legend: n images, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evaluation.dataset import ClassificationDataset
from evaluation.features import Features
from evaluation.ranking import FeatureScores, Scores, chance, hits, image_standing
from evaluation.statistics import Metric

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
_TIES = "tied classes share the credit"


def feature_scores(features: Features) -> FeatureScores:
    """Return the scores of images against classes."""
    # Class vectors are as the similarity made them: embedding is its business.
    image_nD = features.similarity.embed_image(features.image_nD)
    return FeatureScores(image_nD, features.text_CD, features.similarity)


def metrics(scores: Scores, dataset: ClassificationDataset) -> list[Metric]:
    """Return top1, top5 (where there are at least 5 classes) and mean_per_class_recall."""
    return accuracies(scores, dataset.labels_n, len(dataset.class_names))


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
    return total_C / np.maximum(right_nC.sum(axis=0), 1)
