"""Metrics as means over units, and their percentile bootstrap intervals (Efron, 1979).

The resamples are a function of (seed, number of units): two metrics over the same units, and two
checkpoints on the same dataset, see the same resamples, so that their intervals can be paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs import draws

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]

LEVEL = 0.95
PURPOSE = "evaluation/bootstrap"
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Metric:
    """The mean of a value over units; with groups, the mean over groups of the mean within each.

    Groups without a unit do not count.
    """

    name: str
    definition: str
    chance: float
    values_n: FloatArray
    groups_n: IntArray | None = None

    @property
    def value(self) -> float:
        """The metric over all units."""
        everything = np.arange(len(self.values_n))[None, :]
        return float(self.resampled(everything)[0])

    def resampled(self, index_bn: IntArray) -> FloatArray:
        """Return the metric over each row of unit indices [b]."""
        values_bn = self.values_n[index_bn]
        if self.groups_n is None:
            mean_b: FloatArray = values_bn.mean(axis=1)
            return mean_b
        num_rows, num_groups = len(index_bn), int(self.groups_n.max()) + 1
        cell_bn = self.groups_n[index_bn] + num_groups * np.arange(num_rows)[:, None]
        shape, size = (num_rows, num_groups), num_rows * num_groups
        count = np.bincount(cell_bn.ravel(), minlength=size).reshape(shape)
        total = np.bincount(cell_bn.ravel(), values_bn.ravel(), minlength=size).reshape(shape)
        means = np.divide(total, count, out=np.zeros(shape), where=count > 0)
        mean: FloatArray = means.sum(axis=1) / (count > 0).sum(axis=1)
        return mean


def intervals(metrics: Sequence[Metric], *, seed: int, num_bootstrap: int) -> list[Interval]:
    """Return the 95 % percentile interval of each metric: units are drawn with replacement."""
    found: dict[int, Interval] = {}
    for num_units in sorted({len(metric.values_n) for metric in metrics}):
        same = [i for i, metric in enumerate(metrics) if len(metric.values_n) == num_units]
        resampled = _resample([metrics[i] for i in same], num_units, seed, num_bootstrap)
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail], axis=1)
        found |= {i: (float(low[j]), float(high[j])) for j, i in enumerate(same)}
    return [found[i] for i in range(len(metrics))]


def _resample(
    metrics: Sequence[Metric], num_units: int, seed: int, num_bootstrap: int
) -> FloatArray:
    resampled = np.empty((len(metrics), num_bootstrap))
    rows = max(1, _CHUNK_ELEMENTS // num_units)
    unit_n = np.arange(num_units)
    for start in range(0, num_bootstrap, rows):
        stop = min(start + rows, num_bootstrap)
        bits_bn = draws.bits(seed, PURPOSE, np.arange(start, stop)[:, None], unit_n[None, :])
        # The upper half of the bits, scaled to [0, num_units): biased by less than n / 2**32.
        index_bn = ((bits_bn >> np.uint64(32)) * np.uint64(num_units) >> np.uint64(32)).astype(
            np.int64
        )
        for row, metric in enumerate(metrics):
            resampled[row, start:stop] = metric.resampled(index_bn)
    return resampled
