"""Zero-shot classification against CLIP_benchmark's numbers, by hand, and as properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.methods.zero_shot import accuracies, f1_macro
from evaluation.ranking import FeatureScores
from evaluation.statistics import Metric
from pretrain.model.geometries import Cosine

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"


def values(metrics: list[Metric]) -> dict[str, float]:
    return {metric.name: metric.value for metric in metrics}


class Table:
    """Scores given as they are."""

    def __init__(self, scores_nC: torch.Tensor) -> None:
        self.scores_nC = scores_nC
        self.num_images, self.num_texts = scores_nC.shape

    def image_rows(self, start: int, stop: int) -> torch.Tensor:
        return self.scores_nC[start:stop]

    def text_rows(self, start: int, stop: int) -> torch.Tensor:
        return self.scores_nC.T[start:stop]


def test_classifier_logits_and_metrics_are_those_of_clip_benchmark() -> None:
    golden = np.load(GOLDEN / "zeroshot_clip_benchmark_golden.npz", allow_pickle=False)
    cosine = Cosine()
    embeddings = torch.from_numpy(golden["token_embeddings"])
    prompt_CTD = embeddings.reshape(-1, int(golden["n_templates"]), embeddings.shape[1])
    class_CD = cosine.class_vectors(prompt_CTD)
    assert torch.allclose(class_CD, torch.from_numpy(golden["classifier"]).T, rtol=2e-4, atol=1e-6)
    image_nD = cosine.embed(torch.from_numpy(golden["images"]))
    scores = FeatureScores(image_nD, class_CD, cosine)
    logits = 100 * scores.image_rows(0, len(image_nD)).numpy()
    np.testing.assert_allclose(logits, golden["logits"], rtol=2e-4, atol=1e-4)
    found = values(accuracies(scores, golden["labels"], len(class_CD)))
    assert found["top1"] == pytest.approx(float(golden["acc1"]), abs=1e-6)
    assert found["top5"] == pytest.approx(float(golden["acc5"]), abs=1e-6)
    expected = float(golden["mean_per_class_recall"])
    assert found["mean_per_class_recall"] == pytest.approx(expected, abs=1e-6)


def test_prompts_are_normalized_before_they_are_averaged() -> None:
    # One class, prompts (1, 0) and (0, 9): normalize first and the mean points at 45 degrees;
    # average first and the long prompt wins.
    class_CD = Cosine().class_vectors(torch.tensor([[[1.0, 0.0], [0.0, 9.0]]]))
    assert class_CD[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


def test_metrics_of_four_images_in_three_classes_by_hand() -> None:
    # Predictions 0, 0, 1, 2 for the labels 0, 0, 0, 2: top1 = 3/4.
    # Recall: class 0 2/3, class 2 1/1, class 1 has no image: mean 5/6.
    scores = Table(torch.tensor([[3.0, 1, 2], [3, 2, 1], [1, 3, 2], [0, 1, 2]]))
    found = accuracies(scores, np.array([0, 0, 0, 2]), 3)
    assert values(found) == pytest.approx({"top1": 3 / 4, "mean_per_class_recall": 5 / 6})
    assert {metric.name: metric.chance for metric in found} == pytest.approx(
        {"top1": 1 / 3, "mean_per_class_recall": 1 / 3}
    )


def test_top5_is_reported_from_five_classes_up() -> None:
    labels = np.array([0, 1])
    for num_classes, expected in ((4, False), (5, True), (6, True)):
        found = values(accuracies(Table(torch.rand(2, num_classes)), labels, num_classes))
        assert ("top5" in found) is expected
    assert found["top5"] >= found["top1"]


def test_two_classes_of_one_name_stay_two_classes_and_share_the_credit() -> None:
    vectors = torch.eye(3)[[0, 0, 1]]  # class 0 and 1 have the same name, so the same vector
    scores = FeatureScores(torch.eye(3)[[0, 0, 1]], vectors, Cosine())
    assert values(accuracies(scores, np.array([0, 1, 2]), 3))["top1"] == pytest.approx(2 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 30), st.booleans())
def test_the_order_of_samples_and_classes_changes_nothing(
    seed: int, num_classes: int, num_images: int, with_ties: bool
) -> None:
    draw = np.random.default_rng(seed)
    scores_nC = draw.normal(size=(num_images, num_classes))
    if with_ties:
        scores_nC = np.round(scores_nC)
    labels = draw.integers(0, num_classes, num_images)
    images, classes = draw.permutation(num_images), draw.permutation(num_classes)
    moved = Table(torch.from_numpy(scores_nC[images][:, classes]))
    one = values(accuracies(Table(torch.from_numpy(scores_nC)), labels, num_classes))
    other = values(accuracies(moved, np.argsort(classes)[labels[images]], num_classes))
    assert one == pytest.approx(other, abs=1e-12)


def test_a_constant_model_gets_the_chance_level() -> None:
    labels = np.array([0, 0, 0, 3, 6])
    for metric in accuracies(Table(torch.zeros(5, 7)), labels, 7):
        assert metric.value == pytest.approx(metric.chance, abs=1e-12)


def test_macro_f1_is_over_the_classes_that_have_an_image_as_in_wilds() -> None:
    # Class 0: TP 1, FN 1 -> 2/3; class 1: TP 1, FP 1, FN 1 -> 2/4; class 2 is only guessed.
    metric = f1_macro(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), 4)
    assert metric.value == pytest.approx((2 / 3 + 2 / 4) / 2)
