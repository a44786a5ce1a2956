"""Tip-Adapter: a cache of the shots beside the zero-shot logits (Zhang et al., arXiv:2207.09519).

    logits = scale * s(q, t) + alpha * exp(-beta * (s(k, k) - s(q, k))) L

k: the shots' features, L: their labels, one-hot; s: the model's similarity, so that for cosine the
exponent is the published -beta (1 - q k). Published grids: beta 0.1 + i (beta_max - 0.1) / 200, the
outer loop, and alpha 0.1 + j (alpha_max - 0.1) / 20; the first strict improvement on validation
wins. Tip-Adapter-F trains the keys.

Legend: q queries, N shots, C classes, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.methods.few_shot import (
    FewShotTask,
    Fitted,
    Labelled,
    accuracy,
    correct,
    one_hot,
)
from evaluation.methods.training import by_autograd, train
from evaluation.ranking import blocks
from pretrain.model.similarity import Similarity

BETA_STEPS, ALPHA_STEPS = 200, 20
START_BETA, START_ALPHA = 1.0, 1.17  # ImageNet's: the keys are trained at these


def self_scores(key_ND: Tensor, similarity: Similarity) -> Tensor:
    """Return each key's score with itself [N] (cosine: 1), what a perfect match would get."""
    return torch.stack([similarity.scores(k[None], k[None])[0, 0] for k in key_ND])


def shortfall(query_qD: Tensor, key_ND: Tensor, similarity: Similarity, best_N: Tensor) -> Tensor:
    """Return how far each query stays below a perfect match with each key [q, N]; cosine: 1 - qk"""
    return best_N - similarity.scores(query_qD, key_ND)


def cache_logits(shortfall_qN: Tensor, label_NC: Tensor, beta: float) -> Tensor:
    """Return exp(-beta * shortfall) L [q, C]."""
    return torch.exp(-beta * shortfall_qN) @ label_NC


def search(
    logit_qC: Tensor,
    shortfall_qN: Tensor,
    label_NC: Tensor,
    label_q: Tensor,
    *,
    scale: tuple[float, float] = (7.0, 3.0),
    steps: tuple[int, int] = (BETA_STEPS, ALPHA_STEPS),
) -> tuple[float, float]:
    """Return the first best (beta, alpha) of the published grid up to `scale`, by accuracy."""
    betas = [0.1 + i * (scale[0] - 0.1) / steps[0] for i in range(steps[0])]
    alphas = [0.1 + j * (scale[1] - 0.1) / steps[1] for j in range(steps[1])]
    best, chosen = -1, (betas[0], alphas[0])
    alpha_a11 = torch.tensor(alphas, dtype=logit_qC.dtype)[:, None, None]
    width = max(logit_qC.shape[1] * len(alphas), shortfall_qN.shape[1])
    for beta in betas:
        hit_a = torch.zeros(len(alphas), dtype=torch.int64)
        for a, b in blocks(len(logit_qC), width):
            cache_bC = cache_logits(shortfall_qN[a:b], label_NC, beta)
            guess_ab = (logit_qC[a:b] + alpha_a11 * cache_bC).argmax(dim=2)
            hit_a += (guess_ab == label_q[a:b]).sum(dim=1)
        hits = hit_a.tolist()
        top = max(hits)
        if top > best:
            best, chosen = top, (beta, alphas[hits.index(top)])
    return chosen


@dataclass(frozen=True)
class Cache:
    """The shots beside the zero-shot logits, at one beta and alpha."""

    key_ND: Tensor
    label_NC: Tensor
    best_N: Tensor  # each key's score with itself, before it was trained
    similarity: Similarity
    beta: float
    alpha: float

    def logits(self, base_qC: Tensor, query_qD: Tensor) -> Tensor:
        """Return zero-shot logits and what the cache adds [q, C]."""
        short_qN = shortfall(query_qD, self.key_ND, self.similarity, self.best_N)
        return base_qC + self.alpha * cache_logits(short_qN, self.label_NC, self.beta)

    def of(self, part: Labelled) -> Tensor:
        """Return the logits of images, in blocks: all distances of a test set would fill memory."""
        return torch.cat(
            [
                self.logits(part.logit_nC[a:b], part.image_nD[a:b])
                for a, b in blocks(len(part.image_nD), len(self.key_ND))
            ]
        )


def learned_keys(
    task: FewShotTask,
    *,
    beta: float,
    alpha: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    judge: Labelled,
    seed: int | None,
) -> tuple[Tensor, list[float], list[float]]:
    """Train the keys; return those of the epoch that is best on `judge`, losses, accuracies."""
    key_ND = task.train.image_nD.clone().requires_grad_()
    cache = cache_of(task, key_ND, beta, alpha)

    def loss(index_b: Tensor) -> Tensor:
        fused_bC = cache.logits(task.train.logit_nC[index_b], task.train.image_nD[index_b])
        return torch.nn.functional.cross_entropy(fused_bC, task.train.label_n[index_b])

    kept: list[Tensor] = []
    accuracies: list[float] = []

    def after_epoch() -> None:
        with torch.no_grad():
            found = correct(cache.of(judge), judge.label_n)
        if not accuracies or found > max(accuracies):
            kept[:] = [key_ND.detach().clone()]
        accuracies.append(found)

    losses = train(
        [key_ND],
        by_autograd(loss),
        num_rows=len(key_ND),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        after_epoch=after_epoch,
    )
    return kept[0], losses, accuracies


def cache_of(task: FewShotTask, key_ND: Tensor, beta: float, alpha: float) -> Cache:
    """Return the cache of a task's shots with these keys."""
    label_NC = one_hot(task.train.label_n, task.num_classes)
    best_N = self_scores(task.train.image_nD, task.similarity)
    return Cache(key_ND, label_NC, best_N, task.similarity, beta, alpha)


class TipAdapter:
    """Tip-Adapter, or Tip-Adapter-F where `epochs` is not 0."""

    def __init__(
        self, scale: tuple[float, float], *, epochs: int = 0, batch_size: int = 256
    ) -> None:
        self.name = "tip_adapter_f" if epochs else "tip_adapter"
        self.scale = scale
        self.epochs = epochs
        self.batch_size = batch_size

    def _fitted(self, task: FewShotTask, key_ND: Tensor, beta: float, alpha: float) -> Fitted:
        cache = cache_of(task, key_ND, beta, alpha)
        return Fitted(cache.of, {"beta": round(beta, 6), "alpha": round(alpha, 6)})

    def _searched(self, task: FewShotTask, key_ND: Tensor, validation: Labelled) -> Fitted:
        best_N = self_scores(task.train.image_nD, task.similarity)
        short = shortfall(validation.image_nD, key_ND, task.similarity, best_N)
        label_NC = one_hot(task.train.label_n, task.num_classes)
        chosen = search(validation.logit_nC, short, label_NC, validation.label_n, scale=self.scale)
        return self._fitted(task, key_ND, *chosen)

    def _keys(self, task: FewShotTask, judge: Labelled) -> Tensor:
        if not self.epochs:
            return task.train.image_nD
        keys, _, _ = learned_keys(
            task,
            beta=START_BETA,
            alpha=START_ALPHA,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=1e-3,
            judge=judge,
            seed=task.seed,
        )
        return keys

    def fit(self, task: FewShotTask, validation: Labelled) -> Fitted:
        """Choose epoch, beta and alpha on validation."""
        return self._searched(task, self._keys(task, validation), validation)

    def fit_published(self, task: FewShotTask, validation: Labelled, test: Labelled) -> Fitted:
        """Choose the epoch on test, search on validation, and report the better of both on test."""
        keys = self._keys(task, test)
        searched = self._searched(task, keys, validation)
        if not self.epochs:
            return searched
        started = self._fitted(task, keys, START_BETA, START_ALPHA)
        both = (started, searched)
        return max(both, key=lambda fitted: accuracy(fitted.logits(test), test))
