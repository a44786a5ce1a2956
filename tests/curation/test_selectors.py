"""Selectors over vectors against their definitions, in any order of samples and shards."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError, UsageError
from curation.filters import filters
from curation.selectors.cosines import Ranked, exact_cosines, margin, nearest
from curation.selectors.kmeans import train
from tests.curation.vector_pools import build, decide, uid_of, write_shard

DIM = 16


def cosine(a, b):
    """The definition, in Python's exact rationals up to the last square root."""
    from fractions import Fraction

    one, two = ([Fraction(float(x)) for x in v] for v in (a, b))
    dot = sum(x * y for x, y in zip(one, two, strict=True))
    squares = sum(x * x for x in one) * sum(y * y for y in two)
    return float(dot) / float(squares) ** 0.5


def some_vectors(num: int, *, dim=DIM, centers=5, spread=0.3, seed=0) -> np.ndarray:
    """Vectors around some centers; near ones and equal ones among them."""
    rng = np.random.default_rng(seed)
    center = rng.standard_normal((centers, dim))
    array = center[rng.integers(centers, size=num)] + spread * rng.standard_normal((num, dim))
    near = rng.integers(num, size=num // 4)
    array[: len(near)] = array[near] + 0.01 * rng.standard_normal((len(near), dim))
    array[: num // 10] = array[near[: num // 10]]
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float16)


def shards_of(folder, array, *, num_shards=3, seed=0, missing=(), **columns):
    """Spread the samples over shards in an order that the seed draws."""
    array = array.copy()
    array[list(missing)] = np.nan
    order = np.random.default_rng(seed).permutation(len(array)).tolist()
    paths = []
    for number in range(num_shards):
        some = order[number::num_shards]
        path = folder / f"{number}.index.parquet"
        paths.append(write_shard(path, some, {"v": array}, **columns))
    return paths


def test_cosines_are_exact_where_a_comparison_needs_it():
    array = some_vectors(60)
    for i in range(0, 60, 7):
        for j in range(i):
            assert exact_cosines(array[[i]], array[[j]])[0] == cosine(array[i], array[j])
    pairs = exact_cosines(array[1:], array[:-1])
    flipped = exact_cosines(array[1:, ::-1], array[:-1, ::-1])  # another order of the terms
    assert np.array_equal(pairs, flipped)
    single = (array[1:].astype(np.float32) * array[:-1].astype(np.float32)).sum(axis=1)
    norms = np.linalg.norm(array.astype(np.float32), axis=1)
    assert np.abs(single / (norms[1:] * norms[:-1]) - pairs).max() <= margin(DIM)


def test_each_goes_to_the_nearest_centroid_and_the_first_of_equals():
    array = some_vectors(200, seed=1)
    centroids = np.concatenate([array[:7], array[3:4], array[50:53]])
    found, similarity = nearest(array, centroids)
    for i in range(len(array)):
        all_of_them = [cosine(array[i], c) for c in centroids]
        assert similarity[i] == max(all_of_them)
        assert found[i] == all_of_them.index(max(all_of_them))


def test_kmeans_is_the_same_again_and_finds_what_lies_apart():
    array = some_vectors(600, centers=4, spread=0.05, seed=2)
    one, two = (train(array, 4, iterations=10) for _ in range(2))
    assert np.array_equal(one, two)
    assert one.dtype == np.float16
    assert nearest(array, one)[1].min() > 0.9
    assert len(train(array[:3], 10, iterations=2)) == 3


def by_definition(array, cluster, rank, threshold):
    """Return (M_j, for whom j goes) of all samples: every pair of one cluster."""
    largest, better = {}, {}
    for j in range(len(array)):
        before = [i for i in range(len(array)) if cluster[i] == cluster[j] and rank(i) < rank(j)]
        of = {i: exact_cosines(array[[i]], array[[j]])[0] for i in before}
        largest[j] = max(of.values(), default=None)
        above = [i for i in before if of[i] > threshold]
        better[j] = min(above, key=rank, default=None)
    return largest, better


@pytest.mark.parametrize("keep", ["hard", "easy", "resolution"])
def test_semdedup_is_its_definition_in_any_order_of_samples_and_shards(tmp_path, keep, monkeypatch):
    array = some_vectors(150, seed=3)
    missing = {5, 77}
    results = []
    for turn, num_shards in enumerate((1, 4)):
        if turn:
            monkeypatch.setattr("curation.selectors.groups.BYTES_PER_PARTITION", 2 * DIM * 20)
            monkeypatch.setattr("curation.dedup.exchange.MAX_FILES", 2)
        paths = shards_of(
            tmp_path / f"{turn}", array, num_shards=num_shards, seed=turn, missing=missing
        )
        rules = [
            ("clusters", build("clusters", vectors="v", num_clusters=4)),
            ("semdedup", build("semdedup", vectors="v", max_similarity=0.97, keep=[keep])),
        ]
        order = list(range(num_shards))[:: -1 if turn else 1]
        results.append(decide(paths, rules, tmp_path / f"work{turn}", order=order))
    (rows, solutions), (again, _) = results
    values = ["reason", "clusters.cluster", "clusters.similarity"]
    values += ["semdedup.similarity", "semdedup.duplicate_of"]
    assert {u: [row[v] for v in values] for u, row in rows.items()} == {
        u: [row[v] for v in values] for u, row in again.items()
    }
    row_of = [rows[uid_of(n)] for n in range(len(array))]
    there = [n for n in range(len(array)) if n not in missing]

    def rank(i):
        n = there[i]
        similarity = row_of[n]["clusters.similarity"]
        first = {"hard": similarity, "easy": -similarity, "resolution": -(10 + n % 7)}[keep]
        return first, uid_of(n)

    cluster = [row_of[n]["clusters.cluster"] for n in there]
    largest, better = by_definition(array[there], cluster, rank, 0.97)
    for i, n in enumerate(there):
        goes_for = None if better[i] is None else uid_of(there[better[i]])
        assert row_of[n]["semdedup.duplicate_of"] == goes_for
        assert row_of[n]["semdedup.similarity"] == largest[i]
        expected = None if goes_for is None else "semdedup/semantic duplicate"
        assert row_of[n]["reason"] == expected
    assert 20 < sum(b is not None for b in better.values()) < 120
    assert all(row_of[n]["reason"] is None for n in missing)
    assert solutions["clusters"]["num_without_vector"] == 2
    assert solutions["semdedup"]["num_samples"] == 148


def test_semdedup_of_2000_vectors_equals_all_pairs_in_float64():
    array = some_vectors(2000, dim=64, centers=20, seed=4)
    exact = array.astype(np.float64)
    gram = exact @ exact.T
    norms = np.diag(gram)
    all_pairs = gram / np.sqrt(norms[:, None] * norms[None, :])
    all_pairs[np.triu_indices(2000)] = -2
    for threshold in (0.8, 0.95, float(np.sort(all_pairs.ravel())[-3000])):
        ranked = Ranked(array, max_compared=10**6, each_once=True)
        goes, largest = np.zeros(2000, bool), np.full(2000, -2.0)
        for block in ranked.blocks():
            goes[block.rows] = ranked.above(block, threshold).any(axis=1)
            largest[block.rows] = ranked.largest(block)
            assert len(block.columns) < 1950  # equal vectors are among them once
        assert np.array_equal(goes, (all_pairs > threshold).any(axis=1))
        np.testing.assert_array_equal(largest, all_pairs.max(axis=1))
        assert 0 < goes.sum() < 2000


def test_semdedup_by_hand(tmp_path):
    """Four directions at 0, 5, 10 and 40 degrees; cos 5 = 0.9962, cos 10 = 0.9848.

    By resolution 3 (13 x 10) is the best, then 2, 1, 0. Above 0.99 lie 0-1 and 1-2: 1 goes for 2,
    0 goes for 1, which itself goes: one hop. 2 and 3 stay.
    """
    angles = np.deg2rad([0, 5, 10, 40])
    array = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    paths = shards_of(tmp_path, array, num_shards=2)
    rules = [
        ("clusters", build("clusters", vectors="v", num_clusters=1)),
        (
            "semdedup",
            build("semdedup", vectors="v", max_similarity=0.99, keep=["resolution"]),
        ),
    ]
    rows, _ = decide(paths, rules, tmp_path / "work")
    goes_for = [rows[uid_of(n)]["semdedup.duplicate_of"] for n in range(4)]
    assert goes_for == [uid_of(1), uid_of(2), None, None]
    assert rows[uid_of(1)]["semdedup.similarity"] == pytest.approx(0.9962, abs=1e-3)
    assert rows[uid_of(3)]["semdedup.similarity"] is None


def test_semantic_balance_by_hand(tmp_path):
    """Five vectors at 0, 1, 2, 3 and 60 degrees, best first by resolution: 4, 3, 2, 1, 0.

    Within 0.02 (1.15 degrees) of 2 lies the better 3, of 1 the better 2, of 0 the better 1: with
    keep 1 all three go. Within 0.06 (3.4 degrees) of 1 lie 2 and 3: with keep 2 it goes, and 0;
    2 has one better, and stays. A cap of 1 leaves 4, the best.
    """
    angles = np.deg2rad([0, 1, 2, 3, 60])
    array = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    paths = shards_of(tmp_path, array, num_shards=2)

    def reasons(folder, **keywords):
        rules = [
            ("clusters", build("clusters", vectors="v", num_clusters=1)),
            ("balance", build("semantic_balance", vectors="v", keep=["resolution"], **keywords)),
        ]
        rows, _ = decide(paths, rules, tmp_path / folder)
        return [rows[uid_of(n)]["reason"] for n in range(5)], rows

    narrow = [{"distance": 0.02, "keep": 1}]
    found, _ = reasons("a", levels=narrow)
    assert found == ["balance/1 within 0.02"] * 3 + [None, None]
    found, rows = reasons("b", levels=[{"distance": 0.06, "keep": 2}])
    assert found == ["balance/2 within 0.06"] * 2 + [None] * 3
    assert [rows[uid_of(n)]["balance.num_near"] for n in range(5)] == [[3], [2], [1], [0], [0]]
    found, _ = reasons("c", levels=narrow, max_per_cluster=1)
    assert found[3:] == ["balance/above the cap of its cluster", None]
    with pytest.raises(ConfigError, match="give `levels`"):
        build("semantic_balance", vectors="v")


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), num_shards=st.integers(1, 4))
def test_balance_does_not_depend_on_the_order_of_samples_and_shards(
    seed, num_shards, tmp_path_factory
):
    array = some_vectors(80, seed=5)
    folder = tmp_path_factory.mktemp("balance")
    levels = [{"distance": 0.1, "keep": 1}, {"distance": 0.5, "keep": 4}]
    rules = [
        ("clusters", build("clusters", vectors="v", num_clusters=3, missing="drop")),
        ("balance", build("semantic_balance", vectors="v", levels=levels, max_per_cluster=12)),
    ]
    found = []
    for turn, (count, draw) in enumerate([(2, 0), (num_shards, seed)]):
        paths = shards_of(folder / f"{turn}", array, num_shards=count, seed=draw, missing=[3])
        rows, _ = decide(paths, rules, folder / f"work{turn}", seed=9)
        found.append({u: (row["reason"], row["balance.num_near"]) for u, row in rows.items()})
    assert found[0] == found[1]
    assert found[0][uid_of(3)][0] == "clusters/no vector"
    assert len({reason for reason, _ in found[0].values()}) == 5


def test_given_centroids_keep_their_numbers_and_targets_are_counted(tmp_path):
    centroids = np.eye(3, DIM, dtype=np.float32) * 5
    np.save(tmp_path / "classes.npy", centroids)
    np.save(tmp_path / "targets.npy", np.array([[9, 1, 0], [0, 1, 0], [0, 2, 1]]) @ np.eye(3, DIM))
    array = np.zeros((5, DIM), np.float16)
    array[:4, :3] = [[1, 0, 0.1], [0, 1, 0], [0, 0, 1], [0.1, 0.9, 0]]  # the fifth has no direction
    rule = build(
        "clusters", vectors="v", centroids=tmp_path / "classes.npy", target=tmp_path / "targets.npy"
    )
    before = rule.solve_digest
    rows, solutions = decide(shards_of(tmp_path, array), [("c", rule)], tmp_path / "work")
    found = [[rows[uid_of(n)][f"c.{v}"] for v in ("cluster", "num_targets")] for n in range(5)]
    assert found == [[0, 1], [1, 2], [2, 0], [1, 2], [None, None]]
    assert solutions["c"]["num_without_vector"] == 1
    np.save(tmp_path / "targets.npy", centroids)
    assert rule.solve_digest != before
    np.save(tmp_path / "classes.npy", centroids[:, :5])
    with pytest.raises(DataError, match=r"got 5 dimensions; the vectors of the samples have 16"):
        decide(shards_of(tmp_path, array), [("c", rule)], tmp_path / "again")


def test_image_based_keeps_what_lies_in_clusters_of_the_target_set():
    """Clusters with 0, 1 and 2 vectors of the target set, and a sample without a vector."""
    samples = pa.table({"clusters.num_targets": pa.array([0, 1, 2, None], pa.int64())})
    reasons = filters["image_based"]()(samples).reasons.to_pylist()
    assert reasons == ["no target near", None, None, "no vector"]
    reasons = filters["image_based"](min_targets=2)(samples).reasons.to_pylist()
    assert reasons == ["no target near", "no target near", None, "no vector"]
    with pytest.raises(UsageError, match=r"no rule before it gives 'c\.num_targets'"):
        filters["image_based"](clusters="c")(samples)


def test_rules_killed_before_any_of_their_tasks_go_on_to_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("curation.selectors.groups.BYTES_PER_PARTITION", 2 * DIM * 8)
    monkeypatch.setattr("curation.dedup.exchange.MAX_FILES", 2)
    paths = shards_of(tmp_path, some_vectors(40), num_shards=2)
    rules = [
        ("clusters", build("clusters", vectors="v", num_clusters=3)),
        ("semdedup", build("semdedup", vectors="v", max_similarity=0.97)),
        ("poison", build("poison", vectors="v", k=3, batch_size=10, remove=0.2)),
    ]
    expected = decide(paths, rules, tmp_path / "whole")
    assert decide(paths, rules, tmp_path / "killed", stop=2) == expected
    left = [path.name for path in (tmp_path / "killed").rglob("*") if path.is_dir()]
    assert sorted(left) == ["clusters", "found", "found", "poison", "semdedup"]


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ConfigError, match="give either `num_clusters`"):
        build("clusters", vectors="v")
    paths = shards_of(tmp_path, some_vectors(5))
    rule = build("semdedup", vectors="v", max_similarity=0.9)
    with pytest.raises(UsageError, match=r"semdedup: no rule before it is called 'clusters'"):
        decide(paths, [("semdedup", rule)], tmp_path / "work")
    with pytest.raises(UsageError, match=r"nowhere\.npy cannot be read"):
        _ = build("clusters", vectors="v", centroids=tmp_path / "nowhere.npy").solve_digest


def test_shards_without_samples_or_vectors_are_no_trouble(tmp_path):
    array = np.full((6, DIM), np.nan, np.float16)
    rules = [
        ("clusters", build("clusters", vectors="v", num_clusters=3)),
        ("semdedup", build("semdedup", vectors="v", max_similarity=0.9)),
    ]
    paths = shards_of(tmp_path / "a", array)
    paths.append(write_shard(tmp_path / "a" / "9.index.parquet", [], {}))
    rows, solutions = decide(paths, rules, tmp_path / "work")
    assert all(row["reason"] is None for row in rows.values())
    assert solutions["clusters"]["num_clusters"] == 0
    paths = shards_of(tmp_path / "b", some_vectors(6))
    paths.insert(0, write_shard(tmp_path / "b" / "9.index.parquet", [], {}))
    _, solutions = decide(paths, rules, tmp_path / "work2")
    assert solutions["semdedup"]["num_samples"] == 6
