"""What selectors do with little, with nothing, and with what does not fit together; they say so."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import ConfigError, DataError
from curation.selectors.cosines import Ranked
from curation.selectors.moments import balance_moments
from tests.curation.test_selectors import DIM, shards_of, some_vectors
from tests.curation.vector_pools import build, decide, uid_of, write_shard

WORDS = {"attribute": "one", "share": 0.5, "words": ["caption"]}


def test_clusters_are_found_where_few_of_the_pool_have_a_vector(tmp_path):
    """Of 400 samples 8 have a vector, all of which 2 clusters are to be trained on."""
    array = np.full((400, DIM), np.nan, np.float16)
    array[::50] = some_vectors(8, centers=2, spread=0.05, seed=1)
    rule = build("clusters", vectors="v", num_clusters=2, train_per_cluster=4)
    rows, solutions = decide(shards_of(tmp_path, array), [("c", rule)], tmp_path / "work")
    assert solutions["c"]["num_clusters"] == 2
    assert solutions["c"]["num_with_vector"] == 8
    found = [rows[uid_of(n)]["c.similarity"] for n in range(0, 400, 50)]
    assert min(found) > 0.9
    assert "warnings" not in solutions["c"]


def test_fewer_clusters_than_were_asked_for_are_said(tmp_path):
    array = np.repeat(some_vectors(3, seed=2), 4, axis=0)
    rule = build("clusters", vectors="v", num_clusters=50)
    _, solutions = decide(shards_of(tmp_path, array), [("c", rule)], tmp_path / "work")
    assert solutions["c"]["num_clusters"] <= 12
    (said,) = solutions["c"]["warnings"]
    assert f"{solutions['c']['num_clusters']} clusters where 50 were asked for" in said
    assert "12 samples have a vector" in said


def test_target_vectors_that_have_no_direction_are_counted_and_none_at_all_is_an_error(tmp_path):
    array = some_vectors(20)
    targets = array[:4].astype(np.float32)
    targets[1], targets[2] = np.nan, 0
    np.save(tmp_path / "targets.npy", targets)
    rule = build("clusters", vectors="v", num_clusters=2, target=tmp_path / "targets.npy")
    _, solutions = decide(shards_of(tmp_path, array), [("c", rule)], tmp_path / "work")
    assert solutions["c"]["num_targets"] == 2
    assert "2 of the 4 vectors of the target set" in solutions["c"]["warnings"][0]
    np.save(tmp_path / "targets.npy", targets[1:3])
    with pytest.raises(DataError, match=r"targets\.npy: none of its 2 rows is a vector"):
        decide(shards_of(tmp_path, array), [("c", rule)], tmp_path / "again")


def test_clipcov_refuses_vectors_and_labels_that_do_not_fit_together(tmp_path):
    image = some_vectors(30, centers=3)
    np.save(tmp_path / "classes.npy", image[:4])
    np.save(tmp_path / "labels.npy", image[:2])
    clusters = ("clusters", build("clusters", vectors="image", centroids=tmp_path / "classes.npy"))
    narrow = write_shard(tmp_path / "a" / "0.index.parquet", range(30),
                         {"image": image, "text": image[:, :5]})  # fmt: skip
    keywords = {"images": "image", "texts": "text", "fraction": 0.5}
    with pytest.raises(DataError, match=r"'image' have 16 dimensions and 'text' 5.*of one model"):
        decide([narrow], [clusters, ("k", build("clipcov", **keywords))], tmp_path / "work1")
    both = write_shard(tmp_path / "b" / "0.index.parquet", range(30),
                       {"image": image, "text": image})  # fmt: skip
    rule = build("clipcov", **keywords, labels=tmp_path / "labels.npy")
    with pytest.raises(DataError, match=r"labels\.npy: got 2 rows.*cluster 3.*a row for each"):
        decide([both], [clusters, ("k", rule)], tmp_path / "work2")


def test_equal_pairs_of_a_large_class_are_picked_by_uid(tmp_path):
    """2,500 pairs of which each stands there five times: equal scores are ties, and uid decides."""
    image = np.repeat(some_vectors(500, dim=64, centers=1, spread=0.6), 5, axis=0)
    rules = [
        ("clusters", build("clusters", vectors="image", num_clusters=1, train_per_cluster=4)),
        ("clipcov", build("clipcov", images="image", texts="text", fraction=0.5)),
    ]
    text = image[:, ::-1].copy()
    path = write_shard(tmp_path / "0.index.parquet", range(2500), {"image": image, "text": text})
    rows, _ = decide([path], rules, tmp_path / "work")
    for first in range(0, 2500, 5):
        same = sorted(range(first, first + 5), key=uid_of)
        picks = [rows[uid_of(n)]["clipcov.pick"] for n in same]
        assert picks == sorted(picks)


def test_more_than_the_pool_has_is_kept_and_said(tmp_path):
    array = some_vectors(12)
    paths = [write_shard(tmp_path / "0.index.parquet", range(12), {"image": array, "text": array})]
    rules = [
        ("clusters", build("clusters", vectors="image", num_clusters=1)),
        ("clipcov", build("clipcov", images="image", texts="text", size=100)),
    ]
    rows, solutions = decide(paths, rules, tmp_path / "work")
    assert all(row["reason"] is None for row in rows.values())
    assert "size 100: only 12 samples" in solutions["clipcov"]["warnings"][0]


def test_a_pool_too_small_to_be_scored_for_poison_is_said(tmp_path):
    paths = shards_of(tmp_path, some_vectors(9))
    rows, solutions = decide(
        paths, [("p", build("poison", vectors="v", k=16, remove=0.2))], tmp_path / "work"
    )
    assert all(row["reason"] is None for row in rows.values())
    assert solutions["p"]["num_scored"] == 0
    assert "9 of 9 samples with a vector have no score" in solutions["p"]["warnings"][0]


def test_batches_of_poison_hold_samples_with_a_vector(tmp_path):
    """500 samples, 40 with a vector, batches of 40: one batch, not a dozen of three."""
    array = np.full((500, DIM), np.nan, np.float16)
    array[:40] = some_vectors(40)
    rule = build("poison", vectors="v", k=4, batch_size=40)
    _, solutions = decide(shards_of(tmp_path, array), [("p", rule)], tmp_path / "work")
    assert solutions["p"]["num_groups"] == 1
    assert solutions["p"]["num_scored"] == 40


def test_a_cluster_that_was_cut_is_said(tmp_path):
    rules = [
        ("clusters", build("clusters", vectors="v", num_clusters=1)),
        ("semdedup", build("semdedup", vectors="v", max_similarity=0.97, max_cluster=10)),
        ("balance", build("semantic_balance", vectors="v", max_per_cluster=5, max_cluster=10)),
    ]
    _, solutions = decide(shards_of(tmp_path, some_vectors(60)), rules, tmp_path / "work")
    for label in ("semdedup", "balance"):
        assert solutions[label]["num_cut_clusters"] == 1
        assert "1 cluster holds more than 10" in solutions[label]["warnings"][0]


def test_what_m4_cannot_meet_is_said_by_name(tmp_path):
    paths = [write_shard(tmp_path / "0.index.parquet", range(20), {})]  # "caption N": all have it
    rule = build("m4", sensitive=[WORDS], keep_fraction=0.5)
    _, solutions = decide(paths, [("m4", rule)], tmp_path / "work")
    (said,) = solutions["m4"]["warnings"]
    assert "'one' is 0.25, and 0.01 is the most" in said
    fine = build("m4", sensitive=[{**WORDS, "share": 1.0}], keep_fraction=0.5)
    _, solutions = decide(paths, [("m4", fine)], tmp_path / "fine")
    assert "warnings" not in solutions["m4"]


def test_a_solver_that_is_stopped_says_so(monkeypatch):
    terms, shares = np.array([[0.5], [-0.5]]), np.array([0.75, 0.25])
    keywords = {"target": 0.5, "max_weight": 1.0, "penalty": 100.0}
    assert balance_moments(terms, shares, np.zeros(1), **keywords).is_solved
    monkeypatch.setattr("curation.selectors.moments._MAX_STEPS", 3)
    assert not balance_moments(terms, shares, np.zeros(1), **keywords).is_solved


@pytest.mark.parametrize(
    ("sensitive", "message"),
    [
        ([{**WORDS, "words": ["!?"]}], r"'!\?' has no letter or digit"),
        ([WORDS, {**WORDS, "share": 0.2}], "two attributes are called 'one'"),
    ],
)
def test_attributes_that_cannot_be_meant_are_refused(sensitive, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        build("m4", sensitive=sensitive, keep_fraction=0.5)


def test_a_block_of_a_large_cluster_stays_small(monkeypatch):
    """However many columns there are, a block holds a bounded number of cosines, of every pair."""
    monkeypatch.setattr("curation.selectors.cosines._ELEMENTS_AT_ONCE", 2000)
    array = some_vectors(300)
    pairs = 0
    for block in Ranked(array, max_compared=10**6).blocks():
        assert block.cosines.size <= 2000
        pairs += int(block.is_better.sum())
    assert pairs == 300 * 299 // 2


@pytest.mark.parametrize("num", [0, 1, 2])
def test_none_one_and_two_samples_pass_through_every_selector(tmp_path, num):
    array = np.repeat(some_vectors(1), max(num, 1), axis=0)[:num]  # two are equal
    paths = [write_shard(tmp_path / "0.index.parquet", range(num), {"v": array, "t": array})]
    rules = [
        ("clusters", build("clusters", vectors="v", num_clusters=3)),
        ("balance", build("semantic_balance", vectors="v", max_per_cluster=2)),
        ("poison", build("poison", vectors="v", k=2, remove=0.5)),
        ("m4", build("m4", sensitive=[{**WORDS, "share": 1.0}], keep_fraction=1.0)),
        ("clipcov", build("clipcov", images="v", texts="t", fraction=1.0)),
        ("semdedup", build("semdedup", vectors="v", max_similarity=0.9)),
    ]
    rows, _ = decide(paths, rules, tmp_path / "work")
    gone = [row["reason"] for row in rows.values() if row["reason"]]
    assert gone == ["semdedup/semantic duplicate"] * (num // 2)
