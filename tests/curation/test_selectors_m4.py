"""Moment balancing: weights by hand, against another solver, and the subset that is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from curation.selectors.moments import balance_moments
from tests.curation.vector_pools import build, decide, uid_of, write_shard

WOMAN = {"attribute": "woman", "share": 0.5, "column": "woman"}
DOCTOR = {"attribute": "doctor", "column": "doctor"}


def test_weights_by_hand():
    """3 of 4 samples have s = 1, pi = 1/2, eta = 1/2, eps = 0.

    3/4 * 1/2 * q1 = 1/4 * 1/2 * q0, so q0 = 3 q1; 3/4 q1 + 1/4 q0 = 1/2, so q1 = 1/3 and q0 = 1.
    """
    terms, shares = np.array([[0.5], [-0.5]]), np.array([0.75, 0.25])
    found = balance_moments(
        terms, shares, np.zeros(1), target=0.5, max_weight=1.0, penalty=100.0
    ).weights_of(terms)
    assert found == pytest.approx([1 / 3, 1], abs=1e-8)


def test_what_cannot_be_balanced_is_as_near_as_the_largest_weight_lets_it():
    """With eta = 0.9 all of s = 0 stay, q0 = 1, and q1 = (0.9 - 1/4) / (3/4)."""
    terms, shares = np.array([[0.5], [-0.5]]), np.array([0.75, 0.25])
    found = balance_moments(
        terms, shares, np.zeros(1), target=0.9, max_weight=1.0, penalty=100.0
    ).weights_of(terms)
    assert found == pytest.approx([0.65 / 0.75, 1], abs=1e-7)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_weights_meet_what_they_must_and_another_solver_finds_none_nearer(seed):
    from scipy.optimize import minimize

    rng = np.random.default_rng(seed)
    terms = rng.choice([-0.5, 0.0, 0.5], size=(7, 3))
    shares = rng.dirichlet(np.ones(7))
    bounds = np.full(3, 0.02)
    eta = 0.4
    solved = balance_moments(terms, shares, bounds, target=eta, max_weight=1.0, penalty=100.0)
    q = solved.weights_of(terms)
    assert (q >= 0).all() and (q <= 1).all()  # noqa: PT018
    assert shares @ q == pytest.approx(eta, abs=1e-7)
    moments = (shares * q) @ terms
    constraints = [{"type": "eq", "fun": lambda v: shares @ v - eta}]
    for sign in (1, -1):
        constraints.append(
            {"type": "ineq", "fun": lambda v, s=sign: bounds - s * ((shares * v) @ terms)}
        )
    other = minimize(
        lambda v: (shares * (v - eta) ** 2).sum() / 2,
        np.full(7, eta),
        bounds=[(0, 1)] * 7,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    if other.success:  # the bounds can be met
        assert (np.abs(moments) <= bounds + 1e-6).all()
        assert (shares * (q - eta) ** 2).sum() / 2 <= other.fun + 1e-7


def people(num=6000, seed=0):
    """Doctors are seldom women: attributes by number, the samples without them known too."""
    rng = np.random.default_rng(seed)
    woman = rng.random(num) < 0.3
    doctor = rng.random(num) < np.where(woman, 0.05, 0.2)
    return woman.astype(float).tolist(), doctor.astype(float).tolist()


def shards_of(folder, woman, doctor, *, num_shards, seed):
    order = np.random.default_rng(seed).permutation(len(woman)).tolist()
    columns = {"woman": woman, "doctor": doctor}
    return [
        write_shard(folder / f"{n}.index.parquet", order[n::num_shards], {}, **columns)
        for n in range(num_shards)
    ]


def test_a_pool_is_balanced_in_representation_and_association_in_any_order(tmp_path):
    woman, doctor = people()
    woman[11] = None
    rule = build(
        "m4",
        sensitive=[WOMAN],
        labels=[DOCTOR],
        keep_fraction=0.4,
        max_representation_bias=0.005,
        max_association_bias=0.002,
    )
    found = []
    for turn, num_shards in enumerate((1, 5)):
        paths = shards_of(tmp_path / f"{turn}", woman, doctor, num_shards=num_shards, seed=turn)
        rows, solutions = decide(paths, [("m4", rule)], tmp_path / f"work{turn}", seed=3)
        found.append({u: (r["reason"], r["m4.weight"], r["m4.drawn"]) for u, r in rows.items()})
    assert found[0] == found[1]
    solution = solutions["m4"]
    assert solution["max_violation"] <= 1e-6
    assert solution["mean_weight"] == pytest.approx(0.4, abs=1e-6)
    assert abs(solution["moments"]["woman"]["before"]) > 0.05
    assert abs(solution["moments"]["woman"]["after"]) <= 0.005 + 1e-6
    assert abs(solution["moments"]["woman, doctor"]["after"]) <= 0.002 + 1e-6
    assert found[0][uid_of(11)][:2] == (None, None)
    kept = [n for n in range(len(woman)) if n != 11 and found[0][uid_of(n)][0] is None]
    assert len(kept) / len(woman) == pytest.approx(0.4, abs=0.02)
    share = sum(woman[n] for n in kept) / len(kept)
    assert share == pytest.approx(0.5, abs=0.005 / 0.4 + 0.03)
    doctors = [n for n in kept if doctor[n]]
    before = [n for n in range(len(woman)) if doctor[n] and n != 11]
    assert sum(woman[n] for n in before) / len(before) < 0.12
    assert sum(woman[n] for n in doctors) / len(doctors) > 0.33
    for reason, weight, draw in found[0].values():
        assert weight is None or (reason is None) == (draw < weight)


def test_attributes_are_words_of_the_caption_and_others_may_be_left_alone(tmp_path):
    paths = [write_shard(tmp_path / "0.index.parquet", range(40), {})]  # "caption N"
    few = {"attribute": "few", "share": 0.25, "words": ["Caption 1", "caption 2", "caption 3"]}
    odd = {"attribute": "odd", "share": 0.75, "words": ["39"]}
    rule = build(
        "m4", sensitive=[few, odd], keep_fraction=0.5, among="any", max_representation_bias=0
    )
    rows, solutions = decide(paths, [("m4", rule)], tmp_path / "work")
    weights = [rows[uid_of(n)]["m4.weight"] for n in range(40)]
    assert weights[1] == weights[2] == weights[3]
    assert 3 * weights[1] * 3 == pytest.approx(weights[39], abs=1e-6)  # a quarter and three
    assert len({round(w, 9) for n, w in enumerate(weights) if n not in (1, 2, 3, 39)}) == 1
    assert solutions["m4"]["num_patterns"] == 3


def test_m4_says_what_is_wrong():
    from configs.load import validate
    from curation.config import CurateConfig

    with pytest.raises(ConfigError, match=r"keep_fraction 0\.9 is the mean"):
        build("m4", sensitive=[WOMAN], keep_fraction=0.9, max_weight=0.5)
    tree = {"name": "m4", "keep_fraction": 0.5, "sensitive": [{"attribute": "x", "share": 0.5}]}
    job = {"name": "t", "output": "o", "sources": [{"name": "s", "shards": "x"}], "rules": [tree]}
    with pytest.raises(ConfigError, match=r"attribute 'x': give either `column` or `words`"):
        validate(job, CurateConfig, label="t")
