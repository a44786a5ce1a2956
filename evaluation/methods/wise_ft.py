"""WiSE-FT: the straight line between two models' weights (Wortsman et al., arXiv:2109.01903).

    theta_a = (1 - a) theta_0 + a theta_1
    Fisher: (c_0 theta_0 + c_1 theta_1) / (c_0 + c_1), c_0 = (1 - a) max(F_0, floor), c_1 likewise

The published code also averages integer buffers; here they must be equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.errors import CheckpointError

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
FISHER_FLOOR = 1e-8
Weights = Mapping[str, Tensor]


def interpolate(zero: Weights, one: Weights, alpha: float) -> dict[str, Tensor]:
    """Return the weights at `alpha` between two models of one architecture."""
    _check(zero, one)
    return {
        name: (1 - alpha) * zero[name] + alpha * one[name]
        if zero[name].is_floating_point()
        else zero[name]
        for name in zero
    }


def interpolate_fisher(
    zero: Weights,
    one: Weights,
    fisher_zero: Weights,
    fisher_one: Weights,
    alpha: float,
    floor: float = FISHER_FLOOR,
) -> dict[str, Tensor]:
    """Return the weights at `alpha`, each weighted by its Fisher information in each model."""
    _check(zero, one)
    merged = {}
    for name in zero:
        a = (1 - alpha) * fisher_zero[name].clamp(min=floor)
        b = alpha * fisher_one[name].clamp(min=floor)
        merged[name] = (a * zero[name] + b * one[name]) / (a + b)
    return merged


def _check(zero: Weights, one: Weights) -> None:
    if zero.keys() != one.keys():
        odd = sorted(zero.keys() ^ one.keys())
        raise CheckpointError(
            f"wise_ft: the two models have other weights: {', '.join(odd[:5])} in one of them only "
            f"({len(odd)} in all). Expected two checkpoints of one architecture."
        )
    for name, tensor in zero.items():
        same_kind = tensor.is_floating_point() or torch.equal(tensor, one[name])
        if tensor.shape != one[name].shape or not same_kind:
            raise CheckpointError(
                f"wise_ft: {name} is {tuple(tensor.shape)} in one model and "
                f"{tuple(one[name].shape)} in the other, or an integer buffer that differs. "
                "Expected two checkpoints of one architecture."
            )
