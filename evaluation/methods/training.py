"""The training loop that the trained few-shot methods share: AdamW, cosine per step.

Tip-Adapter-F and AMU-Tuning both publish AdamW (eps 1e-4, weight decay 0.01) with the learning rate
on a cosine over all steps; the order of rows is a function of (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from configs import draws

EPS = 1e-4
WEIGHT_DECAY = 0.01
_PURPOSE = "evaluation/few-shot order"


def by_autograd(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    """Return a step for `train` that differentiates `loss`, a function of row indices."""

    def step(index_b: Tensor) -> float:
        value = loss(index_b)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    return step


def train(
    weights: Sequence[Tensor],
    step: Callable[[Tensor], float],
    *,
    num_rows: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int | None,
    weight_decay: float = WEIGHT_DECAY,
    after_epoch: Callable[[], object] | None = None,
) -> list[float]:
    """Change the weights in place; return the loss of every step.

    `step` sets the weights' gradients for a batch of row indices, and returns the loss. `seed` None
    keeps the rows in their order. The last batch of an epoch may be smaller.
    """
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, eps=EPS, weight_decay=weight_decay, foreach=False
    )
    num_steps = max(1, epochs * -(-num_rows // batch_size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    losses = []
    for epoch in range(epochs):
        order = np.arange(num_rows)
        if seed is not None:
            order = draws.permutation(num_rows, seed, _PURPOSE, epoch)
        for start in range(0, num_rows, batch_size):
            optimizer.zero_grad()
            losses.append(step(torch.from_numpy(order[start : start + batch_size])))
            optimizer.step()
            schedule.step()
        if after_epoch is not None:
            after_epoch()
    return losses
