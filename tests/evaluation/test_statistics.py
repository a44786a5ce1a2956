"""Bootstrap intervals: deterministic, equal to the plain loop, and where they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import draws
from evaluation import statistics
from evaluation.methods.zero_shot import f1_macro
from evaluation.statistics import (
    PURPOSE,
    STRATA_PURPOSE,
    Metric,
    intervals,
    resample_within,
)


def metric(values: object, groups: object = None) -> Metric:
    array = np.asarray(values, dtype=np.float64)
    return Metric("m", "", 0.0, array, None if groups is None else np.asarray(groups))


def test_a_grouped_metric_is_the_mean_over_groups_that_have_a_unit() -> None:
    # Group 0: 1, 0, 0 -> 1/3; group 2: 1 -> 1; group 1 is empty.
    assert metric([1, 0, 0, 1], [0, 0, 0, 2]).value == pytest.approx(2 / 3)
    assert metric([1, 0, 0, 1]).value == pytest.approx(1 / 2)


def test_the_interval_is_that_of_the_plain_loop_over_resamples() -> None:
    values = np.random.default_rng(0).random(23)
    groups = np.arange(23) % 4  # of 6, 6, 6 and 5 units: 5, 5, 5 and 4 are drawn
    means, recalls = [], []
    for resample in range(200):
        bits = draws.bits(5, PURPOSE, np.uint64(resample), np.arange(23))
        means.append(np.mean(values[[(int(b) >> 32) * 23 >> 32 for b in bits]]))
        bits = draws.bits(5, STRATA_PURPOSE, np.uint64(resample), np.arange(19))
        per_group, slot = [], 0
        for group in range(4):
            own = values[groups == group]
            drawn = [own[(int(b) >> 32) * len(own) >> 32] for b in bits[slot : slot + len(own) - 1]]
            per_group.append(np.mean(drawn))
            slot += len(own) - 1
        recalls.append(np.mean(per_group))
    found = intervals([metric(values), metric(values, groups)], seed=5, num_bootstrap=200)
    assert found[0] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found[1] == pytest.approx(tuple(np.quantile(recalls, [0.025, 0.975])))


def test_resamples_within_strata_keep_their_sizes_and_draw_single_ones_together() -> None:
    strata = np.array([7, 3, 3, 3, 9, 5, 3])  # 3 has four units; 5, 7 and 9 one each
    counts = resample_within(strata, 0, 0, 500)
    assert counts[:, strata == 3].sum(axis=1) == pytest.approx(4)
    assert counts[:, strata != 3].sum(axis=1) == pytest.approx(3)
    assert counts.mean(axis=0) == pytest.approx(1, abs=0.12)
    assert (resample_within(np.array([0, 1, 1]), 0, 0, 9)[:, 0] == 1).all()  # alone: always drawn


def test_the_variance_of_a_mean_over_groups_is_unbiased_for_two_units_a_group() -> None:
    values, groups = np.tile([0.0, 1.0], 500), np.repeat(np.arange(500), 2)
    spread = statistics.resampled([metric(values, groups)], 0, 2000)[0].std()
    assert spread == pytest.approx((0.5 / 2 / 500) ** 0.5, rel=0.05)  # s^2 = 1/2, n = 2, G = 500


def test_recall_and_macro_f1_of_small_classes_are_covered_at_the_stated_level() -> None:
    """50 classes of one image, known to 60 %, and 50 of 3 to 5 images, known to 10 %.

    Resampling over all images would lose the single ones and shift the recall down.
    """
    draw = np.random.default_rng(0)
    size = np.concatenate([np.ones(50, dtype=int), draw.integers(3, 6, 50)])
    label = np.repeat(np.arange(100), size)
    known = np.where(size == 1, 0.6, 0.1)[label]

    def measured() -> tuple[Metric, object]:
        right = draw.random(len(label)) < known
        guess = np.where(right, label, draw.integers(0, 100, len(label)))
        return metric(guess == label, label), f1_macro(guess, label, 100)

    truth = [
        np.mean([m.value for m in both])
        for both in zip(*(measured() for _ in range(400)), strict=True)
    ]
    inside = np.zeros(2)
    for _ in range(100):
        both = measured()
        found = intervals(both, seed=0, num_bootstrap=200)
        inside += [low <= t <= high for (low, high), t in zip(found, truth, strict=True)]
        assert all(low <= m.value <= high for (low, high), m in zip(found, both, strict=True))
    assert (inside >= 90).all()  # of 100; a collapsed stratum is wide rather than narrow


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
    assert -1e-12 <= grouped[0] <= both[1].value + 1e-12
    assert both[1].value - 1e-12 <= grouped[1] <= 1 + 1e-12


def test_the_width_is_that_of_the_normal_approximation_for_many_units() -> None:
    values = np.arange(4000) % 2  # mean 1/2, standard error 0.5 / sqrt(4000)
    low, high = intervals([metric(values)], seed=0, num_bootstrap=1000)[0]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 4000**0.5, rel=0.08)


def test_equal_units_have_an_interval_of_no_width() -> None:
    assert intervals([metric([1, 1, 1])], seed=0, num_bootstrap=100) == [(1, 1)]
