"""Several sources in one sequence of positions, by weight, with exact quotas at every moment.

Each source has a whole-number share q_i of a period of D positions. Within the period the positions
are dealt by earliest deadline first (the single-resource case of Pfair scheduling: Baruah, Cohen,
Plaxton and Varvel, Algorithmica 1996): after any t positions, source i has had t q_i / D samples to
within one. So every batch has the mixture, whatever its size, and position p is sample number
(p div D) q_i + rank of its source: nothing is carried along, every source has its own epochs, and
any position is reached at once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from pretrain.data.order import Int64Array

MAX_PERIOD = 1 << 16


def shares_of(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in proportion to the weights, their sum at most MAX_PERIOD.

    Exact where the decimal fractions given allow it ([0.7, 0.3] is [7, 3]), else to the nearest
    65,536th (largest remainders), at least 1 for each source.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    parts = [weight / total for weight in exact]
    period = math.lcm(*(part.denominator for part in parts))
    if period > MAX_PERIOD:
        period = MAX_PERIOD
    shares = [max(1, int(part * period)) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (shares[i] - parts[i] * period, i))
    for i in by_remainder[: max(0, period - sum(shares))]:
        shares[i] += 1
    common = math.gcd(*shares)
    return [share // common for share in shares]


class Mixture:
    """Deals positions to sources in proportion to `weights`."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = shares_of(weights)
        self.period = sum(self.shares)
        self._source = _deal(self.shares)
        self._rank = np.empty(self.period, dtype=np.int64)
        for source, share in enumerate(self.shares):
            self._rank[self._source == source] = np.arange(share)

    def split(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the source [b] of each position, and which sample of that source it is [b]."""
        turn, phase = np.divmod(positions, self.period)
        source = self._source[phase]
        return source, turn * np.asarray(self.shares, dtype=np.int64)[source] + self._rank[phase]


def _deal(shares: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the source of each of sum(shares) slots: sample n of a source has a deadline.

    It is released at floor(n D / q) and due before ceil((n + 1) D / q).
    """
    period = sum(shares)
    dealt = np.empty(period, dtype=np.int64)
    waiting = [(0, source, 0) for source in range(len(shares))]  # release, source, n
    ready: list[tuple[int, int, int]] = []  # deadline, source, n
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, n = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(n + 1) * period // shares[source]), source, n))
        _, source, n = heapq.heappop(ready)
        dealt[slot] = source
        if n + 1 < shares[source]:
            heapq.heappush(waiting, ((n + 1) * period // shares[source], source, n + 1))
    return dealt
