"""Outlier scores against their formulas, by hand and in any order; and ClipCov's greedy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from curation.selectors.clipcov import greedy, labels_of
from curation.selectors.cosines import unit
from curation.selectors.outliers import neighbours, scores
from tests.curation.test_selectors import shards_of, some_vectors
from tests.curation.vector_pools import build, decide, uid_of, write_shard


def by_formula(array, detector, k, estimator):
    """The definitions, one sample at a time."""
    rows = array.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    num = len(rows)
    near = []
    for i in range(num):
        apart = [(math.dist(rows[i], rows[j]), j) for j in range(num) if j != i]
        near.append(sorted(apart)[:k])
    kdist = [pairs[-1][0] for pairs in near]

    def lid(i):
        a = [distance for distance, _ in near[i]]
        if estimator == "mom":
            m = sum(a) / k
            return m / (a[-1] - m)
        return -k / sum(math.log(x / a[-1] + 1e-4) for x in a[:-1])

    def score(i):
        if detector in ("kdist", "lid"):
            return kdist[i] if detector == "kdist" else lid(i)
        ratios = [(kdist[i] / kdist[j], j) for _, j in near[i]]
        if detector == "slof":
            return sum(r for r, _ in ratios) / k
        return sum(lid(j) * math.log(r) for r, j in ratios) / k

    return [score(i) for i in range(num)]


@pytest.mark.parametrize("detector", ["kdist", "lid", "slof", "dao"])
def test_outlier_scores_are_their_formulas(detector):
    array = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float16)
    for estimator in ("mle", "mom"):
        found = scores(array, detector, k=5, estimator=estimator)
        np.testing.assert_allclose(found, by_formula(array, detector, 5, estimator), rtol=1e-6)


def test_kdist_and_slof_by_hand():
    """Unit vectors at 0, 60, 90 and 180 degrees: 1 apart at 60, sqrt 2 at 90, sqrt 3 at 120, 2.

    Nearest two: of 0: 60 (1), 90; of 60: 90 (0.5176), 0 (1); of 90: 60, then 0 or 180 (sqrt 2);
    of 180: 90, 60 (sqrt 3). So kdist = sqrt 2, 1, sqrt 2, sqrt 3, and of 180 slof is the mean of
    sqrt 3 / sqrt 2 and sqrt 3 / 1.
    """
    array = np.array([[1, 0], [0.5, math.sqrt(0.75)], [0, 1], [-1, 0]]).astype(np.float16)
    near, _ = neighbours(array, 2)
    assert near.tolist() == [[1, 2], [2, 0], [1, 0], [2, 1]]  # of equally near ones the first
    kdist = scores(array, "kdist", k=2, estimator="mle")
    assert kdist == pytest.approx([math.sqrt(2), 1, math.sqrt(2), math.sqrt(3)], abs=1e-3)
    slof = scores(array, "slof", k=2, estimator="mle")
    assert slof[3] == pytest.approx((math.sqrt(1.5) + math.sqrt(3)) / 2, abs=1e-3)


@pytest.mark.parametrize("detector", ["kdist", "slof", "dao"])
def test_few_samples_of_a_direction_of_their_own_are_found_and_more_than_k_are_not(detector):
    """Of 1,000 around five centers 8 lie around a sixth: fewer than the 16 neighbours; then 40."""
    rng = np.random.default_rng(3)
    centers = np.linalg.qr(rng.standard_normal((32, 6)))[0].T
    found = {}
    for few in (8, 40):
        of = np.append(rng.integers(5, size=1000), np.full(few, 5))
        array = (centers[of] + 0.1 * rng.standard_normal((len(of), 32))).astype(np.float16)
        values = scores(array, detector, k=16, estimator="mle")
        above = values[of == 5][:, None] > values[of < 5][None, :]
        found[few] = above.mean()  # AUROC
    assert found[8] == 1
    assert found[40] < 0.95


def test_equal_vectors_count_as_the_most_suspicious():
    array = np.concatenate([np.repeat([[1, 2, 3]], 8, axis=0), np.eye(3)]).astype(np.float16)
    assert neighbours(array, 3)[1][0].tolist() == [0, 0, 0]
    for detector in ("lid", "slof", "dao"):
        assert (scores(array, detector, k=3, estimator="mle")[:8] == 1000).all()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), num_shards=st.integers(1, 4))
def test_poison_does_not_depend_on_the_order_of_samples_and_shards(
    seed, num_shards, tmp_path_factory
):
    array = np.concatenate([some_vectors(90, seed=5), np.repeat(some_vectors(1), 9, axis=0)])
    folder = tmp_path_factory.mktemp("poison")
    rules = [("poison", build("poison", vectors="v", k=4, batch_size=30, remove=0.1))]
    found = []
    for turn, (count, draw) in enumerate([(2, 0), (num_shards, seed)]):
        paths = shards_of(folder / f"{turn}", array, num_shards=count, seed=draw, missing=[3])
        rows, solutions = decide(paths, rules, folder / f"work{turn}", seed=9)
        found.append({u: (row["reason"], row["poison.score"]) for u, row in rows.items()})
    assert found[0] == found[1]
    assert found[0][uid_of(3)] == (None, None)
    assert solutions["poison"]["num_groups"] == 3
    gone = [score for reason, score in found[0].values() if reason == "poison/suspicious"]
    stays = [score for reason, score in found[0].values() if reason is None and score is not None]
    assert len(gone) == 9 == int(98 * 0.1)
    assert min(gone) >= max(stays)


def test_poison_drops_by_a_score_or_only_scores(tmp_path):
    paths = shards_of(tmp_path, some_vectors(40), missing=[7])
    rows, _ = decide(paths, [("p", build("poison", vectors="v", k=3))], tmp_path / "a")
    values = [row["p.score"] for row in rows.values() if row["p.score"] is not None]
    assert len(values) == 39
    bound = float(np.median(values))
    rule = build("poison", vectors="v", k=3, max_score=bound, missing="drop")
    rows, _ = decide(paths, [("p", rule)], tmp_path / "b")
    for row in rows.values():
        score = row["p.score"]
        expected = None if score is not None and score <= bound else "p/suspicious"
        assert row["reason"] == ("p/no vector" if score is None else expected)
    with pytest.raises(ConfigError, match="batch_size 20 is too small"):
        build("poison", vectors="v", batch_size=20)


def naive_clipcov(image, text, classes, label, *, tie, budget, block):
    """Return the picked samples: one pick of all classes at a time, everything summed anew."""
    x, t = image.astype(np.float64), text.astype(np.float64)
    score, since, picked, cross = {}, {c: [] for c in set(classes)}, [], {}
    similarity = np.maximum(x @ t.T, 0)
    members = {c: [i for i, k in enumerate(classes) if k == c] for c in set(classes)}
    for of_class in members.values():
        for i in of_class:
            cross[i] = sum(similarity[i, j] + similarity[j, i] for j in of_class)
            centre = x[i] @ t[of_class].mean(axis=0) + t[i] @ x[of_class].mean(axis=0)
            score[i] = cross[i] + 2 * similarity[i, i] + label[i] / 2 - centre
    while len(picked) < budget:
        best = min(score, key=lambda i: (-round(score[i], 6), tie(i)))
        picked.append(best)
        del score[best]
        c = classes[best]
        since[c].append(best)
        if len(since[c]) == block:
            new, since[c] = since[c], []
            for i in members[c]:
                if i in score:
                    near = sum(similarity[i, j] + similarity[j, i] for j in new) / len(members[c])
                    mean = sum(cross[j] for j in new) / block
                    score[i] -= near + mean + sum(label[j] for j in new) / block / 2
    return picked


def pairs_of(num, seed=0):
    """Image and text vectors that agree more or less."""
    image = some_vectors(num, seed=seed, spread=0.6)
    text = image + 0.2 * np.random.default_rng(seed + 1).standard_normal(image.shape)
    return image, text.astype(np.float16)


def clipcov_shards(folder, image, text, *, num_shards, seed):
    order = np.random.default_rng(seed).permutation(len(image)).tolist()
    return [
        write_shard(
            folder / f"{n}.index.parquet", order[n::num_shards], {"image": image, "text": text}
        )
        for n in range(num_shards)
    ]


def test_clipcov_equals_the_naive_greedy_on_300_in_any_order(tmp_path):
    image, text = pairs_of(300)
    image[17] = np.nan
    prompts = some_vectors(5, seed=0, centers=5, spread=0.1)
    np.save(tmp_path / "prompts.npy", prompts)
    prompt_file = tmp_path / "prompts.npy"
    rules = [
        ("clusters", build("clusters", vectors="image", centroids=prompt_file)),
        (
            "clipcov",
            build("clipcov", images="image", texts="text", labels=prompt_file, size=120, block=20),
        ),
    ]
    found = []
    for turn, num_shards in enumerate((1, 4)):
        paths = clipcov_shards(tmp_path / f"{turn}", image, text, num_shards=num_shards, seed=turn)
        rows, _ = decide(paths, rules, tmp_path / f"work{turn}")
        found.append({u: (r["reason"], r["clipcov.score"]) for u, r in rows.items()})
    assert found[0] == found[1]
    assert found[0][uid_of(17)] == ("clipcov/no vector", None)
    there = [n for n in range(300) if n != 17]
    classes = {n: rows[uid_of(n)]["clusters.cluster"] for n in there}
    assert len(set(classes.values())) > 2
    x, t, lines = unit(image[there]), unit(text[there]), unit(prompts.astype(np.float16))
    own = lines[[classes[n] for n in there]].astype(np.float64)
    label = np.maximum((x * own).sum(axis=1), 0) + np.maximum((t * own).sum(axis=1), 0)
    of_class = [classes[n] for n in there]
    picked = naive_clipcov(
        x, t, of_class, label, tie=lambda i: uid_of(there[i]), budget=120, block=20
    )
    kept = {n for n in there if found[0][uid_of(n)][0] is None}
    assert kept == {there[i] for i in picked}


def test_clipcov_by_hand():
    """A class of three: x = t = (1, 0), (1, 0), (0, 1); block 1, no labels.

    cross = 4, 4, 2; s_ii = 1; the mean of x and t is (2/3, 1/3), so centre = 4/3, 4/3, 2/3, and the
    scores are 4 + 2 - 4/3 = 14/3, 14/3, 2 + 2 - 2/3 = 10/3. The first is picked; then the second
    loses 2/3 + 4, and is at 0; the third 0 + 4: -2/3. The second; then the third loses 0 + 4 more.
    """
    rows = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    order, at = greedy(rows, rows, labels_of(rows, rows, None), block=1)
    assert order.tolist() == [0, 1, 2]
    assert at.tolist() == pytest.approx([14 / 3, 0, -14 / 3], abs=1e-6)
    assert labels_of(rows, rows, np.array([2, 0], np.float16)).tolist() == [2, 2, 0]


def test_clipcov_says_what_it_lacks():
    with pytest.raises(ConfigError, match="either `fraction` or `size`"):
        build("clipcov", images="a", texts="b")
