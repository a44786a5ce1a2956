from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError, UsageError
from curation.balancing import balancers
from curation.balancing.base import entry_probability, keep_probability
from curation.balancing.matching import EntryMatcher, space_entry, space_text
from curation.balancing.metadata import load_metadata


def lists(rows) -> pa.Array:
    return pa.array(rows, pa.list_(pa.int32()))


words = st.text(st.sampled_from("ab ,.\t\n!A"), max_size=12)


@given(
    st.lists(words.filter(bool), min_size=1, max_size=12, unique=True), st.lists(words, max_size=6)
)
def test_matching_equals_the_naive_loop(entries, captions):
    naive = [
        [i for i, entry in enumerate(entries) if space_entry(entry) in space_text(caption)]
        for caption in captions
    ]
    assert EntryMatcher(entries).match(captions).to_pylist() == naive


def test_keep_probabilities_of_four_captions_by_hand():
    # counts 40, 10, 5 at t = 10: p = 1/4, 1, 1; a caption with entries 0 and 3 (p = 1/2):
    # keep = 1 - 3/4 * 1/2 = 5/8
    probability = entry_probability([40, 10, 5, 20], t=10)
    assert probability.tolist() == [0.25, 1.0, 1.0, 0.5]
    keep = keep_probability(lists([[0], [0, 1], [], [0, 3]]), probability)
    assert keep.tolist() == [0.25, 1.0, 0.0, 0.625]
    assert keep_probability(lists([]), probability).tolist() == []


@given(
    counts=st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    matched=st.lists(st.sets(st.integers(0, 3)).map(sorted), max_size=10),
    t=st.floats(0.5, 500),
)
def test_keep_probability_is_one_for_the_tail_and_grows_with_t(counts, matched, t):
    keep = keep_probability(lists(matched), entry_probability(counts, t))
    more = keep_probability(lists(matched), entry_probability(counts, 2 * t))
    assert ((keep >= 0) & (keep <= 1)).all()
    assert (more >= keep - 1e-12).all()
    for entries, probability in zip(matched, keep, strict=True):
        if any(counts[e] <= t for e in entries):
            assert probability == 1.0
        assert (probability == 0) == (not entries)


@pytest.mark.parametrize("name", ["list.json", "list.txt", "list.json.gz", "list.txt.gz"])
def test_metadata_is_read_from_json_and_lines_in_order(tmp_path, name):
    entries = ["New York", "york", "The", "the", "7"]
    text = json.dumps(entries) if "json" in name else "\n".join(entries) + "\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert load_metadata(tmp_path / name) == entries


def test_wrong_metadata_is_said(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        balancers["metaclip"](metadata=tmp_path / "none.txt", t=1)
    for content, message in {
        '["a", "b", "a"]': "'a' more than once",
        '{"a": 1}': "list of non-empty strings",
        "[]": "no entries",
        "[": "cannot be read",
    }.items():
        path = tmp_path / "list.json"
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_metadata(path)
