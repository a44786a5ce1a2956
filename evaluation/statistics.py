"""Metrics over units, and their percentile bootstrap intervals (Efron, 1979).

The resamples are a function of (seed, number of units): two metrics over the same units, and two
checkpoints on the same dataset, see the same resamples, so that their intervals can be paired. A
resample is how often each unit was drawn: counts [b, n], of which a metric gives its value.

Legend: n units, b resamples, s seeds of a few-shot method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from configs import draws

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]

LEVEL = 0.95
PURPOSE = "evaluation/bootstrap"
SEED_PURPOSE = "evaluation/bootstrap seeds"
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Metric:
    """The mean of a value over units; with groups, the mean over groups of the mean within each.

    Groups without a unit do not count. `chance` is None where no level is chance.
    """

    name: str
    definition: str
    chance: float | None
    values_n: FloatArray
    groups_n: IntArray | None = None

    @property
    def num_units(self) -> int:
        """The number of units."""
        return len(self.values_n)

    @property
    def value(self) -> float:
        """The metric over all units, each once."""
        return float(self.weighted(np.ones((1, self.num_units)))[0])

    @cached_property
    def _by_group(self) -> tuple[IntArray, IntArray]:
        assert self.groups_n is not None
        order = np.argsort(self.groups_n, kind="stable")
        starts = np.append(0, np.flatnonzero(np.diff(self.groups_n[order])) + 1)
        return order, starts

    def weighted(self, count_bn: FloatArray) -> FloatArray:
        """Return the metric for each row of counts."""
        if self.groups_n is None:
            # Not a matrix product, whose rounding depends on the number of rows
            mean_b: FloatArray = (count_bn * self.values_n).sum(axis=1) / count_bn.sum(axis=1)
            return mean_b
        order, starts = self._by_group
        count_bn = count_bn[:, order]
        size_bg = np.add.reduceat(count_bn, starts, axis=1)
        total_bg = np.add.reduceat(count_bn * self.values_n[order], starts, axis=1)
        share_bg = np.divide(total_bg, size_bg, out=np.zeros_like(total_bg), where=size_bg > 0)
        mean: FloatArray = share_bg.sum(axis=1) / (size_bg > 0).sum(axis=1)
        return mean


@dataclass(frozen=True)
class SeedMetric:
    """The mean over seeds and units of values [s, n]; its resamples draw seeds as well as units."""

    name: str
    definition: str
    chance: float | None
    values_sn: FloatArray
    groups_n: IntArray | None = None

    @property
    def num_units(self) -> int:
        """The number of units."""
        return len(self.values_sn[0])

    @property
    def values_n(self) -> FloatArray:
        """The mean over seeds of each unit."""
        mean: FloatArray = self.values_sn.mean(axis=0)
        return mean

    @property
    def value(self) -> float:
        """The mean over all."""
        return float(self.values_sn.mean())

    def weighted(self, count_bn: FloatArray) -> FloatArray:
        """Return the mean over the seeds that each row of counts draws.

        Which seeds a row draws is a function of its counts, so that cutting the resamples into
        pieces changes nothing.
        """
        total_bs = np.stack([(count_bn * own).sum(axis=1) for own in self.values_sn], axis=1)
        share_bs = total_bs / count_bn.sum(axis=1, keepdims=True)
        num_seeds = self.values_sn.shape[0]
        word_b = (count_bn * np.arange(1.0, self.num_units + 1)).sum(axis=1).astype(np.uint64)
        pick_bs = draws.uniform(0, SEED_PURPOSE, word_b[:, None], np.arange(num_seeds)[None, :])
        chosen_bs = (pick_bs * num_seeds).astype(np.int64)
        value: FloatArray = np.take_along_axis(share_bs, chosen_bs, axis=1).mean(axis=1)
        return value


@dataclass(frozen=True)
class Statistic:
    """Anything else that has a value for counts of units: `function` maps [b, n] to [b]."""

    name: str
    definition: str
    chance: float | None
    num_units: int
    function: Callable[[FloatArray], FloatArray]
    has_interval: bool = True
    values_n: FloatArray | None = None
    groups_n: IntArray | None = None

    @property
    def value(self) -> float:
        """The value over all units, each once."""
        return float(self.function(np.ones((1, self.num_units)))[0])

    def weighted(self, count_bn: FloatArray) -> FloatArray:
        """Return the value for each row of counts."""
        return self.function(count_bn)


AnyMetric = Metric | SeedMetric | Statistic


def number(name: str, definition: str, value: float, num_units: int) -> Statistic:
    """Return a value without an interval."""
    return Statistic(
        name, definition, None, num_units, lambda count: np.full(len(count), value), False
    )


def resample(num_units: int, seed: int, start: int, stop: int) -> FloatArray:
    """Return how often each unit was drawn in resamples start..stop [b, n]."""
    unit_n = np.arange(num_units)
    bits_bn = draws.bits(seed, PURPOSE, np.arange(start, stop)[:, None], unit_n[None, :])
    # The upper half of the bits, scaled to [0, num_units): biased by less than n / 2**32.
    index_bn = ((bits_bn >> np.uint64(32)) * np.uint64(num_units) >> np.uint64(32)).astype(np.int64)
    rows = stop - start
    cell = index_bn + num_units * np.arange(rows)[:, None]
    counts = np.bincount(cell.ravel(), minlength=rows * num_units)
    return counts.reshape(rows, num_units).astype(np.float64)


@lru_cache(maxsize=2)
def _all_counts(num_units: int, seed: int, num_bootstrap: int) -> FloatArray:
    counts = resample(num_units, seed, 0, num_bootstrap)
    counts.setflags(write=False)
    return counts


def resampled(metrics: Sequence[AnyMetric], seed: int, num_bootstrap: int) -> FloatArray:
    """Return the value of each metric in each resample [metrics, b]; they have equally many units.

    Memory is bounded: large sets are resampled in pieces.
    """
    num_units = metrics[0].num_units
    if num_units * num_bootstrap <= _CHUNK_ELEMENTS:
        counts = _all_counts(num_units, seed, num_bootstrap)
        return np.stack([metric.weighted(counts) for metric in metrics])
    rows = max(2, _CHUNK_ELEMENTS // num_units)
    values = np.empty((len(metrics), num_bootstrap))
    for start in range(0, num_bootstrap, rows):
        stop = min(start + rows, num_bootstrap)
        counts = resample(num_units, seed, start, stop)
        values[:, start:stop] = [metric.weighted(counts) for metric in metrics]
    return values


def intervals(
    metrics: Sequence[AnyMetric], *, seed: int, num_bootstrap: int
) -> list[Interval | None]:
    """Return the 95 % percentile interval of each metric: units are drawn with replacement."""
    found: dict[int, Interval | None] = {}
    wanted = [i for i, metric in enumerate(metrics) if getattr(metric, "has_interval", True)]
    for num_units in sorted({metrics[i].num_units for i in wanted}):
        same = [i for i in wanted if metrics[i].num_units == num_units]
        values = resampled([metrics[i] for i in same], seed, num_bootstrap)
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(values, [tail, 1 - tail], axis=1)
        found |= {i: (float(low[j]), float(high[j])) for j, i in enumerate(same)}
    return [found.get(i) for i in range(len(metrics))]


def paired_difference(
    a: AnyMetric, b: AnyMetric, *, seed: int, num_bootstrap: int
) -> tuple[float, Interval, float]:
    """Return b - a of two metrics over the same units, its interval, and a two-sided p-value.

    p is twice the smaller share of resamples on either side of 0, at least 1 / num_bootstrap.
    """
    values = resampled([a, b], seed, num_bootstrap)
    difference = values[1] - values[0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(difference, [tail, 1 - tail])
    below, above = float((difference <= 0).mean()), float((difference >= 0).mean())
    p = min(1.0, max(2 * min(below, above), 1 / num_bootstrap))
    return b.value - a.value, (float(low), float(high)), p
