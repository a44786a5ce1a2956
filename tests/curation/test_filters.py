from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.columns import type_of
from curation.filters import filters
from curation.filters.base import needs_of
from curation.verdicts import judge_samples

CAPTIONS = ["", "one", "two words", "three words here", "a b c d e"]


def table(captions, sizes=None, problems=None):
    sizes = sizes or [(10, 10)] * len(captions)
    return pa.table(
        {
            "uid": pa.array([bytes([i]) * 16 for i in range(len(captions))], pa.binary(16)),
            "key": [str(i) for i in range(len(captions))],
            "caption": pa.array(captions, pa.string()),
            "width": pa.array([s[0] for s in sizes], pa.int32()),
            "height": pa.array([s[1] for s in sizes], pa.int32()),
            "image_size": pa.array([1000] * len(captions), pa.int64()),
            "problem": pa.array(problems or [None] * len(captions), pa.string()),
        }
    )


def test_caption_length_gives_the_first_reason_and_the_lengths():
    judge = filters["caption_length"](min_words=2, max_words=4, min_characters=10)
    values, reasons = judge(table(CAPTIONS))
    assert values["words"].to_pylist() == [0, 1, 2, 3, 5]
    assert values["characters"].to_pylist() == [0, 3, 9, 16, 9]
    assert reasons.to_pylist() == [
        "too few words",
        "too few words",
        "too few characters",
        None,
        "too many words",
    ]


def test_image_size_looks_at_the_shorter_side_and_the_aspect():
    judge = filters["image_size"](min_side=200, max_aspect=3.0)
    sizes = [(200, 600), (199, 300), (200, 601), (900, 300)]
    values, reasons = judge(table(["c"] * 4, sizes))
    assert values["min_side"].to_pylist() == [200, 199, 200, 300]
    assert reasons.to_pylist() == [None, "side too short", "too elongated", None]


# The least that each filter must be told.
KEYWORDS = {
    "digits": {"max_share": 0.5},
    "language": {"keep": ("en",)},
    "regex": {"drop": ("a",)},
    "score": {"column": "width", "min": 1},
    "script": {"keep": ("Latin",)},
}


@pytest.mark.parametrize("name", list(filters))
def test_every_filter_takes_an_empty_table(name):
    judge = filters[name](**KEYWORDS.get(name, {}))
    samples = table([])
    for column in needs_of([judge]).columns:
        samples = samples.append_column(column, pa.array([], type_of(column)))
    if name == "image_based":  # it judges a value of the rule before it
        samples = samples.append_column("clusters.num_targets", pa.array([], pa.int64()))
    values, reasons = judge(samples)
    assert len(reasons) == 0
    assert all(len(column) == 0 for column in values.values())


def test_a_filter_sees_only_what_no_rule_before_it_dropped():
    rules = [
        ("caption_length", filters["caption_length"](min_words=2)),
        ("image_size", filters["image_size"](min_side=5)),
    ]
    sizes = [(1, 1), (9, 9), (1, 1), (0, 0)]
    samples = table(
        ["one", "two words", "two words", "two words"], sizes, [None] * 3 + ["empty image"]
    )
    rows = judge_samples(samples, rules).to_pylist()
    assert [row["verdict"] for row in rows] == ["dropped", "kept", "dropped", "unreadable"]
    assert [row["reason"] for row in rows] == [
        "caption_length/too few words",
        None,
        "image_size/side too short",
        "empty image",
    ]
    assert [row["caption_length.words"] for row in rows] == [1, 2, 2, None]
    assert [row["image_size.min_side"] for row in rows] == [None, 9, 1, None]


@given(st.lists(st.text(max_size=20), max_size=20), st.integers(0, 4), st.integers(0, 10))
def test_two_independent_filters_keep_the_same_in_either_order(captions, words, side):
    rules = [
        ("caption_length", filters["caption_length"](min_words=words)),
        ("image_size", filters["image_size"](min_side=side)),
    ]
    samples = table(captions, [(i + 1, 7) for i in range(len(captions))])
    kept = [judge_samples(samples, order)["verdict"] for order in (rules, rules[::-1])]
    assert kept[0].equals(kept[1])
