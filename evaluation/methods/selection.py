"""Image-caption selection: Winoground (arXiv:2204.03162), SugarCrepe (arXiv:2306.14610).

An instance has a images and b captions, image i belongs to caption i for i < m = min(a, b):
    text_acc    for all i < m, caption i is the best for image i
    image_acc   for all j < m, image j is the best for caption j
    acc         both
SugarCrepe has one image and two captions (the right one first): text_acc is its accuracy, and
image_acc says nothing. A right answer that is tied with t - 1 others counts 1/t, so that a constant
model scores chance (the authors' strict comparison counts it wrong).

Legend: k instances, a images, b captions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.model.similarity import Similarity


def instance_scores(image_kaD: Tensor, text_kbD: Tensor, similarity: Similarity) -> Tensor:
    """Return the scores of each instance's images against its captions [k, a, b]."""
    pairs = zip(image_kaD, text_kbD, strict=True)
    return torch.stack([similarity.scores(image, text) for image, text in pairs])


def credits(score_kab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return text_acc, image_acc and acc of each instance [k], in [0, 1]."""
    m = min(score_kab.shape[1:])
    right_km = torch.diagonal(score_kab, dim1=1, dim2=2)[:, :m]
    best_ka, tied_ka = _best(score_kab[:, :m], right_km[:, :, None])
    best_kb, tied_kb = _best(score_kab[:, :, :m].transpose(1, 2), right_km[:, :, None])
    text_k = (best_ka / tied_ka).prod(dim=1)
    image_k = (best_kb / tied_kb).prod(dim=1)
    return text_k, image_k, text_k * image_k


def _best(score_kmc: Tensor, right_km1: Tensor) -> tuple[Tensor, Tensor]:
    is_best = (score_kmc <= right_km1).all(dim=2).double()
    return is_best, (score_kmc == right_km1).sum(dim=2).clamp(min=1)


def chance(num_images: int, num_captions: int) -> tuple[float, float, float | None]:
    """Return the chance levels of text_acc, image_acc and acc (None where not worked out)."""
    m = min(num_images, num_captions)
    text, image = num_captions**-m, num_images**-m
    if m == 1:
        return text, image, text * image
    # two by two: of the 4! orders of four scores, 4 have both diagonal ones on top of all others
    both = 4 / math.factorial(4) if num_images == num_captions == 2 else None
    return text, image, both
