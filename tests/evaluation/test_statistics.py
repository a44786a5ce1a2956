"""Bootstrap intervals: deterministic, equal to the plain loop, and where they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import draws
from evaluation import statistics
from evaluation.statistics import PURPOSE, Metric, intervals


def metric(values: object, groups: object = None) -> Metric:
    array = np.asarray(values, dtype=np.float64)
    return Metric("m", "", 0.0, array, None if groups is None else np.asarray(groups))


def test_a_grouped_metric_is_the_mean_over_groups_that_have_a_unit() -> None:
    # Group 0: 1, 0, 0 -> 1/3; group 2: 1 -> 1; group 1 is empty.
    assert metric([1, 0, 0, 1], [0, 0, 0, 2]).value == pytest.approx(2 / 3)
    assert metric([1, 0, 0, 1]).value == pytest.approx(1 / 2)


def test_the_interval_is_that_of_the_plain_loop_over_resamples() -> None:
    values = np.random.default_rng(0).random(23)
    groups = np.arange(23) % 4
    means, recalls = [], []
    for resample in range(200):
        bits = draws.bits(5, PURPOSE, np.uint64(resample), np.arange(23))
        index = [(int(b) >> 32) * 23 >> 32 for b in bits]
        means.append(np.mean(values[index]))
        by_group = [[values[i] for i in index if groups[i] == g] for g in range(4)]
        recalls.append(np.mean([np.mean(group) for group in by_group if group]))
    found = intervals([metric(values), metric(values, groups)], seed=5, num_bootstrap=200)
    assert found[0] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found[1] == pytest.approx(tuple(np.quantile(recalls, [0.025, 0.975])))


def test_neither_chunks_nor_other_metrics_change_an_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(1)
    metrics = [metric(draw.random(n)) for n in (40, 31, 40)]
    whole = intervals(metrics, seed=0, num_bootstrap=150)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 90)
    assert intervals(metrics, seed=0, num_bootstrap=150) == whole
    assert intervals(metrics[1:2], seed=0, num_bootstrap=150) == whole[1:2]
    assert intervals(metrics, seed=1, num_bootstrap=150) != whole


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 8))
def test_the_interval_contains_the_value_and_stays_in_range(
    seed: int, num_units: int, num_groups: int
) -> None:
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 2, num_units)
    both = [metric(values), metric(values, draw.integers(0, num_groups, num_units))]
    plain, grouped = intervals(both, seed=seed, num_bootstrap=300)
    assert 0 <= plain[0] <= both[0].value + 1e-12
    assert both[0].value - 1e-12 <= plain[1] <= 1
    assert 0 <= grouped[0] <= grouped[1] <= 1


def test_the_width_is_that_of_the_normal_approximation_for_many_units() -> None:
    values = np.arange(4000) % 2  # mean 1/2, standard error 0.5 / sqrt(4000)
    low, high = intervals([metric(values)], seed=0, num_bootstrap=1000)[0]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 4000**0.5, rel=0.08)


def test_equal_units_have_an_interval_of_no_width() -> None:
    assert intervals([metric([1, 1, 1])], seed=0, num_bootstrap=100) == [(1, 1)]
