"""What a few-shot learner is told, and what it may look at: validation, never the test labels.

A learner is handed shots and a validation set and returns a function from features to logits; the
driver (few_shot_sweep.py) alone sees test labels, to score. Only `fit_published`, which reproduces
an author's protocol where it chooses on test data, is given them, and its rows are marked.

Legend: n images, C classes, D embedding width, A width of the auxiliary encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.similarity import Similarity


@dataclass(frozen=True)
class Labelled:
    """Images as a learner sees them: features, labels, zero-shot logits."""

    raw_nD: Tensor  # as the tower gave them
    image_nD: Tensor  # normalized by the similarity
    label_n: Tensor
    logit_nC: Tensor  # scale * similarity with the class vectors
    aux_nA: Tensor | None = None  # features of an auxiliary encoder


@dataclass(frozen=True)
class FewShotTask:
    """The shots, the class vectors [C, D], and the geometry they live in."""

    train: Labelled
    class_CD: Tensor
    similarity: Similarity
    scale: float
    seed: int

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_CD)


@dataclass(frozen=True)
class Fitted:
    """Logits [n, C] of any images, and the hyperparameters that were chosen."""

    logits: Callable[[Labelled], Tensor]
    chosen: dict[str, float]


def correct(logit_nC: Tensor, label_n: Tensor) -> float:
    """Return the share of rows whose highest logit is the label's."""
    return float((logit_nC.argmax(dim=1) == label_n).double().mean())


def accuracy(logit_nC: Tensor, labelled: Labelled) -> float:
    """Return the share of images that the logits get right; 0 where there are none."""
    return correct(logit_nC, labelled.label_n) if len(labelled.label_n) else 0.0


def one_hot(label_n: Tensor, num_classes: int) -> Tensor:
    """Return labels as rows [n, C] of zeros and a one."""
    return torch.nn.functional.one_hot(label_n, num_classes).float()


def labelled(
    raw_nD: Tensor,
    label_n: Tensor,
    class_CD: Tensor,
    similarity: Similarity,
    scale: float,
    aux_nA: Tensor | None = None,
) -> Labelled:
    """Return images with their zero-shot logits."""
    image_nD = similarity.embed_image(raw_nD)
    logit_nC = scale * similarity.scores(image_nD, class_CD)
    return Labelled(raw_nD, image_nD, label_n, logit_nC, aux_nA)
