"""Solve t for the number of samples wanted.

The draw of a sample is fixed by its uid, and its keep probability never falls with t: so the number
kept is a step function of t, and bisection finds the t at which it is the number wanted, exactly.
Each pass over the shards evaluates many values of t at once, and only for samples that are not
decided by both ends of the interval; nothing of the size of the pool is held anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import DataError
from curation.balancing.base import ENTRIES, FloatArray, IntArray, Matched, draw, read_counts
from curation.global_rules.base import Pool, ShardPart

_FIRST_POINTS, _POINTS = 16, 64
_MAX_PASSES = 40
# Two values of t that are nearer than this keep the same samples, but for draws that are equal.
_RESOLUTION = 1e-14


@dataclass(frozen=True)
class _Grid:
    """Thresholds of each group at ascending values of t (points x groups), ends included."""

    folder: Path
    starts: IntArray
    thresholds: FloatArray


def _kept_at(part: ShardPart, grid: _Grid) -> tuple[IntArray, FloatArray]:
    """Return the number kept at each point, and the sum of keep probabilities at both ends."""
    table = part.emitted(ENTRIES)
    counts = read_counts(grid.folder)
    entries = table[ENTRIES].combine_chunks()
    drawn = draw(part, table["uid"])
    ends = [
        Matched(entries, counts, grid.starts).keep_probability(grid.thresholds[point])
        for point in (0, -1)
    ]
    is_open = (drawn >= ends[0]) & (drawn < ends[1])
    kept = np.full(len(grid.thresholds), int((drawn < ends[0]).sum()), np.int64)
    kept[-1] += is_open.sum()
    if is_open.any():
        left = Matched(entries.filter(pa.array(is_open)), counts, grid.starts)
        for point in range(1, len(kept) - 1):
            kept[point] += (drawn[is_open] < left.keep_probability(grid.thresholds[point])).sum()
    return kept, np.array([keep.sum() for keep in ends])


def solve_target(
    pool: Pool,
    starts: IntArray,
    counts: IntArray,
    scale: Callable[[float], FloatArray],
    target_size: int,
) -> dict[str, Any]:
    """Return t, the number of samples it keeps, and the expected number over all seeds.

    The counts lie in the pool's folder. The number kept is `target_size`, unless two samples part
    at the very same t; then it is the next above.

    Raises:
        DataError: fewer samples than that have any entry.
    """
    # The expected number is at most t times the number of entries with a match.
    low = 1e-6 * target_size / max(1, int((counts > 0).sum()))
    high = float(max(counts.max(initial=0), 1))
    points = _FIRST_POINTS
    for _ in range(_MAX_PASSES):
        ts = np.geomspace(low, high, points + 2)
        ts[0], ts[-1] = low, high
        kept, _ = _pass(pool, starts, np.stack([scale(t) for t in ts]))
        if kept[-1] < target_size:
            raise DataError(
                f"{pool.label}: target_size is {target_size:,}, but only {kept[-1]:,} of the "
                f"{pool.num_samples:,} samples that reach the balancer have an entry of the "
                "metadata. Ask for fewer, or loosen the rules before it."
            )
        if kept[0] > target_size and points == _FIRST_POINTS:
            raise DataError(
                f"{pool.label}: target_size is {target_size:,}, but at the smallest t already "
                f"{kept[0]:,} samples are kept: entries of other languages with one caption. Ask "
                "for more, or drop samples by a rule before the balancer."
            )
        above = int(np.searchsorted(kept, target_size))
        low, high = float(ts[max(above - 1, 0)]), float(ts[above])
        points = _POINTS
        if kept[above] == target_size or high <= low * (1 + _RESOLUTION):
            break
    final, expected = _pass(pool, starts, np.stack([scale(high)] * 2))
    return {
        "t": high,
        "target_size": target_size,
        "num_kept": int(final[-1]),
        "expected_num_kept": round(float(expected[-1]), 3),
    }


def _pass(pool: Pool, starts: IntArray, thresholds: FloatArray) -> tuple[IntArray, FloatArray]:
    grid = _Grid(pool.folder, starts, thresholds)
    kept = np.zeros(len(thresholds), np.int64)
    # Sums of floats depend on the order, shards complete in any: keep one number a shard.
    expected = np.zeros((pool.num_shards, 2))
    for number, (more, sums) in pool.map(_kept_at, grid, step="solve t"):
        kept += more
        expected[number] = sums
    return kept, expected.sum(axis=0)
