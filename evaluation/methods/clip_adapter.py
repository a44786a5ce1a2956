"""CLIP-Adapter: a bottleneck on the image feature, mixed with it (Gao et al., arXiv:2110.04544).

    f' = r ReLU(W2 ReLU(W1 f)) + (1 - r) f,    logits = scale * similarity(normalize(f'), t)

W1: D -> D/4, W2: D/4 -> D, no bias; f is the feature before it is normalized. Published: r = 0.2.

Legend: n images, C classes, D embedding width, R = D/4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.methods.few_shot import (
    FewShotTask,
    Fitted,
    Labelled,
    accuracy,
)
from evaluation.methods.training import by_autograd, train
from pretrain.model.similarity import Similarity

RATIOS = (0.2, 0.0, 0.1, 0.4, 0.6, 0.8)  # the published one first: it wins ties
PUBLISHED_RATIO = 0.2


def adapted(image_nD: Tensor, down_RD: Tensor, up_DR: Tensor, ratio: float) -> Tensor:
    """Return the mixed features [n, D] of features that are not normalized."""
    bottleneck_nD = torch.relu(torch.relu(image_nD @ down_RD.T) @ up_DR.T)
    return ratio * bottleneck_nD + (1 - ratio) * image_nD


def adapter_logits(
    image_nD: Tensor,
    class_CD: Tensor,
    down_RD: Tensor,
    up_DR: Tensor,
    *,
    ratio: float,
    scale: float,
    similarity: Similarity,
) -> Tensor:
    """Return logits [n, C] of features that are not normalized against class vectors."""
    mixed_nD = adapted(image_nD, down_RD, up_DR, ratio)
    return scale * similarity.scores(similarity.embed_image(mixed_nD), class_CD)


class ClipAdapter:
    """Learns W1 and W2 by AdamW; the ratio is chosen on validation (published: 0.2)."""

    name = "clip_adapter"

    def __init__(self, *, epochs: int, learning_rate: float, batch_size: int) -> None:
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size

    def _learn(self, task: FewShotTask) -> tuple[Tensor, Tensor]:
        width = task.train.raw_nD.shape[1]
        generator = torch.Generator().manual_seed(task.seed)
        hidden = max(1, width // 4)
        # torch's own initialization of a linear layer: uniform within 1 / sqrt(inputs)
        down_RD = (torch.rand(hidden, width, generator=generator) * 2 - 1) / width**0.5
        up_DR = (torch.rand(width, hidden, generator=generator) * 2 - 1) / hidden**0.5
        weights = [down_RD.requires_grad_(), up_DR.requires_grad_()]
        raw_nD, label_n = task.train.raw_nD, task.train.label_n

        def loss(index_b: Tensor) -> Tensor:
            logits = adapter_logits(
                raw_nD[index_b],
                task.class_CD,
                down_RD,
                up_DR,
                ratio=PUBLISHED_RATIO,
                scale=task.scale,
                similarity=task.similarity,
            )
            return torch.nn.functional.cross_entropy(logits, label_n[index_b])

        train(
            weights,
            by_autograd(loss),
            num_rows=len(label_n),
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=task.seed,
        )
        return down_RD.detach(), up_DR.detach()

    def _fitted(self, task: FewShotTask, weights: tuple[Tensor, Tensor], ratio: float) -> Fitted:
        def logits(labelled: Labelled) -> Tensor:
            return adapter_logits(
                labelled.raw_nD,
                task.class_CD,
                *weights,
                ratio=ratio,
                scale=task.scale,
                similarity=task.similarity,
            )

        return Fitted(logits, {"ratio": ratio})

    def fit(self, task: FewShotTask, validation: Labelled) -> Fitted:
        """Train; choose the ratio on validation."""
        weights = self._learn(task)
        choices = [self._fitted(task, weights, ratio) for ratio in RATIOS]
        return max(choices, key=lambda fitted: accuracy(fitted.logits(validation), validation))

    def fit_published(self, task: FewShotTask, validation: Labelled, test: Labelled) -> Fitted:
        """Train; the ratio is the published one, so that nothing is chosen."""
        return self._fitted(task, self._learn(task), PUBLISHED_RATIO)
