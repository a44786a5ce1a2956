"""What the report says of rules that judge by a number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.score_report import NUM_SHOWN, RuleScores, ScoreRules, shard_scores, summarize_scores

RULES = ScoreRules((("score", "clip_score", "score.value"),))


def part(values, *, first=0, reasons=None):
    """A shard of samples of these values, whose uids count up from `first`."""
    num = len(values)
    uids = pa.array([(first + i).to_bytes(16, "big") for i in range(num)], pa.binary(16))
    index = {"uid": uids, "key": [str(first + i) for i in range(num)], "caption": ["c"] * num,
             "image_ext": ["png"] * num, "image_offset": [0] * num, "image_size": [1] * num,
             "width": [1] * num, "height": [1] * num}  # fmt: skip
    if reasons is None:
        low = [v is not None and v < 0 for v in values]
        reasons = ["score/score too low" if is_low else None for is_low in low]
    decisions = {"uid": uids, "reason": pa.array(reasons, pa.string()),
                 "score.value": pa.array(values, pa.float64())}  # fmt: skip
    return shard_scores("a.tar", pa.table(index), pa.table(decisions), RULES)


def test_values_limits_and_both_ends_of_five_samples():
    reasons = [None, "score/score too low", None, "score/no score", "dedup/duplicate"]
    found = summarize_scores(part([0.5, 0.1, 0.25, None, 0.25], reasons=reasons), RULES)["score"]
    assert (found["column"], found["num_scored"], found["num_left"]) == ("clip_score", 4, 3)
    assert (found["left"], found["dropped"]) == ((0.25, 0.5), (0.1, 0.1))
    low, high = found["lowest"], found["highest"]
    # The first by value, equal values by uid.
    assert [(s["value"], s["key"]) for s in low] == [
        (0.1, "1"),
        (0.25, "2"),
        (0.25, "4"),
        (0.5, "0"),
    ]
    assert [s["key"] for s in high] == ["0", "2", "4", "1"]
    assert [s["outcome"] for s in low] == [
        "score/score too low", "kept", "dedup/duplicate", "kept"
    ]  # fmt: skip
    histogram = found["histogram"]
    assert sum(histogram["before"]) == 4
    assert sum(histogram["after"]) == 3
    assert histogram["before"][0] - histogram["after"][0] == 1
    assert histogram["edges"][0] == pytest.approx(0.1, rel=0.01)


def test_a_rule_that_saw_nothing_has_an_empty_histogram():
    found = summarize_scores(part([None, None]), RULES)["score"]
    assert found["num_scored"] == 0
    assert found["left"] is None
    assert found["histogram"] == {"edges": [], "before": [], "after": []}
    assert summarize_scores({}, RULES)["score"] == found


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 5))
def test_shards_merged_in_any_order_say_what_one_shard_says(seed, num, num_shards):
    rng = np.random.default_rng(seed)
    values = [None if rng.random() < 0.1 else round(float(v), 1) for v in rng.normal(size=num)]
    whole = summarize_scores(part(values), RULES)
    cuts = [0, *sorted(rng.integers(0, num + 1, num_shards - 1).tolist()), num]
    parts = [part(values[a:b], first=a) for a, b in pairwise(cuts)]
    merged = RuleScores()
    for i in rng.permutation(len(parts)):
        merged.merge(parts[i]["score"])
    assert summarize_scores({"score": merged}, RULES) == whole
    assert len(whole["score"]["lowest"]) <= NUM_SHOWN
