from __future__ import annotations

import random
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curation.order import KEY_RECORD
from curation.renames import positions_of_repeats
from curation.words import WordCounts, frequency_curve, words_of
from curation.write import cut_lengths, plan_blocks, plan_segments


@given(
    kept=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    per_block=st.integers(1, 6),
    per_shard=st.integers(1, 25),
)
def test_all_output_shards_but_the_last_are_full_and_cover_every_block(kept, per_block, per_shard):
    rows = [{"source": "s", "shard": str(i), "num_kept": n} for i, n in enumerate(kept)]
    blocks = plan_blocks(rows, seed=1, shards_per_block=per_block)
    assert Counter(row["shard"] for b in blocks for row in b.shards) == Counter(
        r["shard"] for r in rows
    )
    lengths = [cut_lengths(b.start, b.num_kept, per_shard) for b in blocks]
    shards = list(plan_segments(blocks, per_shard))
    assert [number for number, _ in shards] == list(range(-(-sum(kept) // per_shard)))
    sizes = [sum(lengths[b][piece] for b, piece, _ in segments) for _, segments in shards]
    assert all(size == per_shard for size in sizes[:-1])
    assert sum(sizes) == sum(kept)
    at = 0
    for _, segments in shards:
        for block, piece, start in segments:
            assert start == at
            at += lengths[block][piece]


def test_the_order_of_the_shards_in_the_plan_does_not_depend_on_how_they_were_given():
    rows = [{"source": "s", "shard": str(i), "num_kept": 1} for i in range(20)]
    mixed = random.Random(0).sample(rows, 20)
    plans = [plan_blocks(r, seed=1, shards_per_block=3) for r in (rows, mixed)]
    assert plans[0] == plans[1]
    assert plans[0] != plan_blocks(rows, seed=2, shards_per_block=3)


@given(st.lists(st.integers(0, 5), max_size=30), st.randoms())
def test_every_key_but_the_first_in_output_order_is_renamed(hashes, rng):
    records = list(zip(hashes, range(len(hashes)), strict=True))
    expected = [i for i, h in enumerate(hashes) if h in hashes[:i]]
    rng.shuffle(records)
    assert positions_of_repeats(np.array(records, KEY_RECORD)).tolist() == expected


def test_words_beyond_the_limit_are_a_fixed_share_whatever_the_order():
    parts = [Counter({f"w{i}": i + 1 for i in range(k, 300, 3)}) for k in range(3)]
    summaries = []
    for order in (parts, parts[::-1]):
        counts = WordCounts(max_words=100)
        for part in order:
            counts.add(part)
        summaries.append(counts.summary(10))
    assert summaries[0] == summaries[1]
    assert summaries[0]["fraction_counted"] in (0.25, 0.125)
    assert summaries[0]["num_words"] == sum(range(1, 301))


def test_a_curve_has_its_ends_and_falls():
    curve = frequency_curve(np.array([0, 5, 1, 9, 0, *[2] * 1000]))
    assert curve[0] == [1, 9]
    assert curve[-1] == [1003, 1]
    assert len(curve) <= 200
    assert frequency_curve(np.zeros(3, np.int64)) == []
    assert words_of("The cat, the Café") == ["the", "cat", "the", "café"]
