"""Ranks by counting: hand examples, the definition by enumeration, ties, blocks."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import ranking
from evaluation.ranking import FeatureScores, Standing, chance, hits, image_standing, standing
from pretrain.model.geometries import Cosine


def place(scores: list[float], right: list[bool]) -> Standing:
    identity = torch.tensor([1 if is_right else 0 for is_right in right])
    return standing(torch.tensor([scores]), torch.tensor([1]), identity)


def by_enumeration(scores: list[float], right: list[bool], k: int) -> float:
    """The share of orders of the candidates in which, sorted stably, a right one is among k."""
    orders = list(permutations(range(len(scores))))
    found = 0
    for order in orders:
        first = sorted(order, key=lambda i: -scores[i])[:k]
        found += any(right[i] for i in first)
    return found / len(orders)


def test_the_rank_counts_the_candidates_above_the_best_right_one() -> None:
    # scores 0.9 0.5 0.7 0.1, right are 0.7 and 0.1: one candidate (0.9) is above 0.7.
    found = place([0.9, 0.5, 0.7, 0.1], [False, False, True, True])
    assert (found.num_above_n[0], found.num_tied_n[0], found.num_right_tied_n[0]) == (1, 1, 1)
    assert [hits(found, k)[0] for k in (1, 2, 3)] == [0, 1, 1]


def test_two_tied_candidates_share_the_first_place() -> None:
    found = place([0.5, 0.5, 0.1], [True, False, False])
    assert [hits(found, k)[0] for k in (1, 2)] == [0.5, 1]


def test_a_tie_with_two_right_of_three_hits_with_probability_two_thirds() -> None:
    found = place([0.5, 0.5, 0.5, 0.9], [True, True, False, False])
    assert [hits(found, k)[0] for k in (1, 2, 3)] == pytest.approx([0, 2 / 3, 1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hits_equal_the_share_of_random_orders_of_tied_candidates(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=size, max_size=size))
    right = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    for k in range(1, 7):
        expected = by_enumeration(scores, right, k)
        assert hits(place(scores, right), k)[0] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_a_model_with_equal_scores_gets_exactly_the_chance_level(
    num_candidates: int, num_queries: int, seed: int
) -> None:
    num_right_n = np.random.default_rng(seed).integers(1, num_candidates + 1, num_queries)
    right_bm = torch.arange(num_candidates)[None] < torch.from_numpy(num_right_n)[:, None]
    found = [
        standing(torch.zeros(1, num_candidates), torch.tensor([1]), row.long()) for row in right_bm
    ]
    for k in (1, 5, 10):
        mean = np.mean([hits(one, k)[0] for one in found])
        assert mean == pytest.approx(chance(num_right_n, num_candidates, k), abs=1e-12)


def test_chance_of_top_k_is_k_of_the_candidates() -> None:
    one = np.ones(3, dtype=np.int64)
    assert chance(one, 10, 1) == pytest.approx(0.1)
    assert chance(one, 10, 5) == pytest.approx(0.5)
    assert chance(one, 4, 5) == 1


def test_equal_candidates_tie_exactly_whatever_their_place_in_the_matrix_product() -> None:
    torch.manual_seed(0)
    image_nD, text_mD = torch.randn(37, 19), torch.randn(101, 19)
    text_mD[[3, 50, 100]] = text_mD[7].clone()
    image_nD[[0, 36]] = image_nD[5].clone()
    scores = FeatureScores(image_nD, text_mD, Cosine())
    rows = scores.image_rows(0, 37)
    assert torch.equal(rows[:, 3], rows[:, 7])
    assert torch.equal(rows[:, 100], rows[:, 7])
    assert torch.equal(rows[:, 50], rows[:, 7])
    columns = scores.text_rows(0, 101)
    assert torch.equal(columns[:, 0], columns[:, 5])
    assert torch.equal(columns[:, 36], columns[:, 5])
    assert torch.allclose(rows, image_nD @ text_mD.T, atol=1e-5)
    assert torch.allclose(columns, text_mD @ image_nD.T, atol=1e-5)


def test_cutting_the_queries_into_blocks_changes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scores = FeatureScores(torch.randn(40, 8), torch.randn(12, 8), Cosine())
    labels = np.arange(40) % 12
    whole = image_standing(scores, labels, np.arange(12))
    monkeypatch.setattr(ranking, "BLOCK_ELEMENTS", 12 * 7)
    assert len(list(ranking.blocks(40, 12))) == 6
    for one, other in zip(whole, image_standing(scores, labels, np.arange(12)), strict=True):
        assert np.array_equal(one, other)
