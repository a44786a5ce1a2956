"""Metrics over units, and their percentile bootstrap intervals (Efron, 1979).

The resamples are a function of (seed, number of units, strata): two metrics over the same units,
and two checkpoints on the same dataset, see the same resamples, so that their intervals can be
paired. A resample is how often each unit was drawn: counts [b, n], of which a metric gives its
value.

A mean over classes is resampled within the classes (strata), since the classes are given and only
their images are a sample. Drawing over all would lose small classes and shift the mean. From a
class of n images n - 1 are drawn, each counting n / (n - 1): then the variance is unbiased also for
few images a class (McCarthy and Snowden, 1985). Classes of one image say nothing of their variance
each by itself and are drawn together (collapsed strata), which is wide rather than narrow.

A statistic that resampling itself shifts (macro F1, ECE, the worst group) has its interval moved
back by the shift, mean of the resamples less value: `is_shifted`.

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
STRATA_PURPOSE = "evaluation/bootstrap within strata"
SEED_PURPOSE = "evaluation/bootstrap seeds"
_CHUNK_ELEMENTS = 1 << 22  # counts held at once (32 MiB)
_CACHED_ELEMENTS = 1 << 18  # counts that a metric gets at once (2 MiB: the processor's cache)


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

    @property
    def strata_n(self) -> IntArray | None:
        """What is resampled apart: the groups."""
        return self.groups_n

    @cached_property
    def _share_n(self) -> FloatArray:
        """What each unit adds to the mean over groups: its value over its group's size."""
        assert self.groups_n is not None
        _, group_n, size_g = np.unique(self.groups_n, return_inverse=True, return_counts=True)
        share: FloatArray = self.values_n / (size_g[group_n] * len(size_g))
        return share

    def weighted(self, count_bn: FloatArray) -> FloatArray:
        """Return the metric for each row of counts (with groups: drawn within them)."""
        # Not a matrix product, whose rounding depends on the number of rows
        if self.groups_n is not None:
            total_b: FloatArray = (count_bn * self._share_n).sum(axis=1)
            return total_b
        mean_b: FloatArray = (count_bn * self.values_n).sum(axis=1) / count_bn.sum(axis=1)
        return mean_b


@dataclass(frozen=True)
class SeedMetric:
    """The mean over seeds and units of values [s, n]; its resamples draw seeds as well as units."""

    name: str
    definition: str
    chance: float | None
    values_sn: FloatArray
    groups_n: None = None
    strata_n: None = None

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
    strata_n: IntArray | None = None  # drawn apart
    is_shifted: bool = False  # by resampling; a share in [0, 1]

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
    size_n = np.full(num_units, num_units, dtype=np.uint64)
    return _counted(_places(PURPOSE, size_n, seed, start, stop), num_units)


def resample_within(strata_n: IntArray, seed: int, start: int, stop: int) -> FloatArray:
    """Return how much each unit counts in resamples start..stop [b, n], drawn within the strata.

    A stratum's counts add up to its size. Strata of one unit are one stratum together; where there
    is one such alone, it is always drawn.
    """
    _, index_n, size_s = np.unique(strata_n, return_inverse=True, return_counts=True)
    index_n = np.where(size_s[index_n] == 1, -1, index_n)
    order = np.argsort(index_n, kind="stable")
    _, first_s, size_s = np.unique(index_n[order], return_index=True, return_counts=True)
    drawn_s = np.maximum(size_s - 1, 1)
    slot_m = np.repeat(np.arange(len(size_s)), drawn_s)
    place_bm = _places(STRATA_PURPOSE, size_s[slot_m].astype(np.uint64), seed, start, stop)
    count_bn = _counted(order[first_s[slot_m] + place_bm], len(strata_n))
    scale_n = np.empty(len(strata_n))
    scale_n[order] = np.repeat(size_s / drawn_s, size_s)
    return count_bn * scale_n


def _places(
    purpose: str, size_m: npt.NDArray[np.uint64], seed: int, start: int, stop: int
) -> IntArray:
    """Return draws [b, m], the m-th from 0 to size_m - 1."""
    bits_bm = draws.bits(
        seed, purpose, np.arange(start, stop)[:, None], np.arange(len(size_m))[None, :]
    )
    # The upper half of the bits, scaled to [0, size): biased by less than size / 2**32.
    return ((bits_bm >> np.uint64(32)) * size_m >> np.uint64(32)).astype(np.int64)


def _counted(index_bm: IntArray, num_units: int) -> FloatArray:
    rows = len(index_bm)
    cell = index_bm + num_units * np.arange(rows)[:, None]
    counts = np.bincount(cell.ravel(), minlength=rows * num_units)
    return counts.reshape(rows, num_units).astype(np.float64)


@lru_cache(maxsize=2)
def _all_counts(num_units: int, strata: bytes | None, seed: int, num_bootstrap: int) -> FloatArray:
    counts = _counts(num_units, strata, seed, 0, num_bootstrap)
    counts.setflags(write=False)
    return counts


def _counts(num_units: int, strata: bytes | None, seed: int, start: int, stop: int) -> FloatArray:
    if strata is None:
        return resample(num_units, seed, start, stop)
    return resample_within(np.frombuffer(strata, dtype=np.int64), seed, start, stop)


def _strata(metric: AnyMetric) -> bytes | None:
    return None if metric.strata_n is None else metric.strata_n.astype(np.int64).tobytes()


def resampled(metrics: Sequence[AnyMetric], seed: int, num_bootstrap: int) -> FloatArray:
    """Return the value of each metric in each resample [metrics, b]; all of the same units, strata.

    Memory is bounded: large sets are resampled in pieces.
    """
    num_units, strata = metrics[0].num_units, _strata(metrics[0])
    rows = max(2, _CHUNK_ELEMENTS // num_units)
    few = max(2, _CACHED_ELEMENTS // num_units)
    values = np.empty((len(metrics), num_bootstrap))
    for start in range(0, num_bootstrap, rows):
        stop = min(start + rows, num_bootstrap)
        if stop == num_bootstrap and not start:
            counts = _all_counts(num_units, strata, seed, num_bootstrap)
        else:
            counts = _counts(num_units, strata, seed, start, stop)
        for first in range(0, stop - start, few):
            own = counts[first : first + few]
            values[:, start + first : start + first + len(own)] = [
                metric.weighted(own) for metric in metrics
            ]
    return values


def intervals(
    metrics: Sequence[AnyMetric], *, seed: int, num_bootstrap: int
) -> list[Interval | None]:
    """Return the 95 % percentile interval of each metric: units are drawn with replacement."""
    found: dict[int, Interval | None] = {}
    alike: dict[tuple[int, bytes | None], list[int]] = {}
    for i, metric in enumerate(metrics):
        if getattr(metric, "has_interval", True):
            alike.setdefault((metric.num_units, _strata(metric)), []).append(i)
    for same in alike.values():
        values = resampled([metrics[i] for i in same], seed, num_bootstrap)
        found |= {i: _interval(metrics[i], values[j]) for j, i in enumerate(same)}
    return [found.get(i) for i in range(len(metrics))]


def _interval(metric: AnyMetric, value_b: FloatArray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(value_b, [tail, 1 - tail])
    if getattr(metric, "is_shifted", False):
        shift = np.nanmean(value_b) - metric.value
        low, high = np.clip([low - shift, high - shift], 0.0, 1.0)
    return float(low), float(high)


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
