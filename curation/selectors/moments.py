"""The solver of M4: weights of least change whose moments are balanced.

    min over q   sum_p w_p (q_p - eta)^2 / 2  +  V * sum_c max(0, |sum_p w_p a_pc q_p| - eps_c)
    subject to   0 <= q_p <= Q,   sum_p w_p q_p = eta

p runs over the distinct patterns of attributes, w_p is a pattern's share of the samples: samples of
one pattern get one weight, so that millions of samples are a problem of some hundred rows, solved
exactly where the paper goes down a stochastic gradient. Its dual, in l (one a constraint, |l| <= V)
and m, is concave:

    q_p(l, m) = clip(eta - a_p . l - m, 0, Q)
    max over l, m   sum_p w_p ((q_p - eta)^2 / 2 + q_p (a_p . l + m)) - m eta - sum_c eps_c |l_c|

and is climbed by the accelerated proximal gradient (A. Beck and M. Teboulle, "FISTA", 2009) with
restarts where it turns back (B. O'Donoghue and E. Candes, 2015), each column scaled to a mean
square of 1, until a step moves nothing by more than `tolerance`. float64; rows in sorted order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
TOLERANCE = 1e-10
_MAX_STEPS = 200_000


@dataclass(frozen=True)
class Weights:
    """The solution: multipliers, of which `weights_of` makes the weight of any pattern."""

    multipliers: Float64Array  # l, one a constraint
    shift: float  # m
    target: float  # eta
    max_weight: float  # Q
    num_steps: int
    is_solved: bool  # False: stopped after _MAX_STEPS

    def weights_of(self, terms: Float64Array) -> Float64Array:
        """Return q of rows of terms [n, constraints]."""
        return _weights(terms, self.multipliers, self.shift, self.target, self.max_weight)


def _weights(
    terms: Float64Array, multipliers: Float64Array, shift: float, eta: float, top: float
) -> Float64Array:
    slope = (terms * multipliers).sum(axis=1) + shift
    weights: Float64Array = np.clip(eta - slope, 0, top)
    return weights


def balance_moments(
    terms: Float64Array,
    shares: Float64Array,
    bounds: Float64Array,
    *,
    target: float,
    max_weight: float,
    penalty: float,
) -> Weights:
    """Return the weights that balance the moments.

    Shapes: terms a [patterns, constraints], shares w [patterns] (sum 1), bounds eps [constraints].
    """
    scale = np.sqrt((shares[:, None] * terms**2).sum(axis=0))
    scale[scale == 0] = 1
    scaled = np.column_stack([terms / scale, np.ones(len(terms))])
    limit = np.append(penalty * scale, np.inf)
    prices = np.append(bounds / scale, 0)
    step = 1 / np.linalg.eigvalsh(scaled.T @ (shares[:, None] * scaled))[-1]
    at = before = np.zeros(scaled.shape[1])
    speed, number, is_solved = 1.0, 0, False
    while not is_solved and number < _MAX_STEPS:
        number += 1
        faster = (1 + np.sqrt(1 + 4 * speed**2)) / 2
        ahead = at + (speed - 1) / faster * (at - before)
        weights = np.clip(target - (scaled * ahead).sum(axis=1), 0, max_weight)
        moments = (shares[:, None] * scaled * weights[:, None]).sum(axis=0)
        moments[-1] -= target
        moved = ahead + step * moments
        moved = np.sign(moved) * np.maximum(np.abs(moved) - step * prices, 0)
        moved = np.clip(moved, -limit, limit)
        turned_back = ((ahead - moved) * (moved - at)).sum() > 0
        before, at, speed = at, moved, 1.0 if turned_back else faster
        largest = max(np.abs(moved - ahead).max(), np.abs(at - before).max())
        is_solved = bool(largest <= TOLERANCE)
    return Weights(at[:-1] / scale, float(at[-1]), target, max_weight, number, is_solved)
