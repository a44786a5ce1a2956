"""Retrieval recall against CLIP_benchmark's numbers, by hand, and as properties."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.methods.retrieval import recalls
from evaluation.ranking import FeatureScores
from pretrain.model.geometries import Cosine

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"


def score(image_nD: torch.Tensor, text_mD: torch.Tensor) -> FeatureScores:
    cosine = Cosine()
    return FeatureScores(cosine.embed(image_nD), cosine.embed(text_mD), cosine)


def found(scores: FeatureScores, image_of_caption: np.ndarray) -> dict[str, float]:
    return {metric.name: metric.value for metric in recalls(scores, image_of_caption)}


def test_recalls_are_those_of_clip_benchmark() -> None:
    golden = np.load(GOLDEN / "retrieval_clip_benchmark_golden.npz", allow_pickle=False)
    scores = score(torch.from_numpy(golden["image_emb"]), torch.from_numpy(golden["text_emb"]))
    values = found(scores, golden["text_image_index"])
    for k in (1, 5, 10):
        assert values[f"t2i_recall@{k}"] == pytest.approx(
            float(golden[f"image_retrieval_recall@{k}"]), abs=1e-6
        )
        assert values[f"i2t_recall@{k}"] == pytest.approx(
            float(golden[f"text_retrieval_recall@{k}"]), abs=1e-6
        )


def test_recalls_of_two_images_and_three_captions_by_hand() -> None:
    # Image 0 at 0 degrees with captions at 10 and 80; image 1 at 90 degrees with one at 60.
    # t2i@1: 10 -> image 0 (right), 80 -> image 1 (wrong), 60 -> image 1 (right): 2/3.
    # i2t@1: image 0 -> 10 (right); image 1 -> 80, which is image 0's (wrong): 1/2.
    def at(*degrees: float) -> torch.Tensor:
        angle = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    values = found(score(at(0, 90), at(10, 80, 60)), np.array([0, 0, 1]))
    assert values["t2i_recall@1"] == pytest.approx(2 / 3)
    assert values["i2t_recall@1"] == pytest.approx(1 / 2)
    assert values["t2i_recall@5"] == values["i2t_recall@5"] == 1


def test_chance_is_the_mean_over_all_orders_of_the_captions() -> None:
    # Two images, captions 0, 1, 2 of image 0 and 3 of image 1.
    image_of_caption = np.array([0, 0, 0, 1])
    metrics = recalls(score(torch.randn(2, 3), torch.randn(4, 3)), image_of_caption)
    chance = {metric.name: metric.chance for metric in metrics}
    orders = list(permutations(image_of_caption))
    first = np.mean([[order[0] == image for image in (0, 1)] for order in orders])
    assert chance["i2t_recall@1"] == pytest.approx(first)
    assert chance["t2i_recall@1"] == pytest.approx(1 / 2)
    assert chance["t2i_recall@5"] == chance["i2t_recall@5"] == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 15), st.integers(1, 4))
def test_order_changes_nothing_and_recall_grows_with_k(
    seed: int, num_images: int, most_captions: int
) -> None:
    draw = np.random.default_rng(seed)
    image_of_caption = np.repeat(
        np.arange(num_images), draw.integers(1, most_captions + 1, num_images)
    )
    num_captions = len(image_of_caption)
    images, texts = (
        torch.from_numpy(draw.normal(size=(5, 3))[draw.integers(0, 5, n)])
        for n in (num_images, num_captions)
    )
    values = found(score(images, texts), image_of_caption)
    for direction in ("t2i", "i2t"):
        one, five, ten = (values[f"{direction}_recall@{k}"] for k in (1, 5, 10))
        assert 0 <= one <= five <= ten <= 1
    image_order, text_order = draw.permutation(num_images), draw.permutation(num_captions)
    moved = np.argsort(image_order)[image_of_caption[text_order]]
    other = found(score(images[image_order], texts[text_order]), moved)
    assert values == pytest.approx(other, abs=1e-9)


def test_a_caption_that_stands_at_two_images_shares_the_credit() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    values = found(score(images, texts), np.array([0, 1]))
    assert values["t2i_recall@1"] == pytest.approx(1 / 2)
    assert values["i2t_recall@1"] == pytest.approx(1 / 2)
