"""De-duplication against its definition: every pair compared, in any order and any partition."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import validate
from curation.config import CurateConfig
from curation.dedup.caption_count import sum_counts
from curation.dedup.exchange import give, take
from curation.dedup.kinds import HASH_BITS, band_edges, caption_digest, make_kind
from curation.dedup.links import link_equal, link_near
from curation.dedup.ranks import make_ranks
from curation.dedup.rule import find_dropped, first_of_each, judge_dropped, make_records
from curation.dedup.text import NearTexts, normalize_caption, num_rows, shingles, text_bands
from curation.global_rules import global_rules

DISTANCE, COLOR, JACCARD, SHINGLE = 3, 16.0, 0.6, 3
ALL = ("image", "url", "caption", "phash", "text")
KEEP = ("resolution", "caption_length", "key")


def kinds_of(names):
    return tuple(
        make_kind(
            name,
            distance=DISTANCE,
            max_color=COLOR,
            min_jaccard=JACCARD,
            shingle=SHINGLE,
            url_column="json.url",
        )
        for name in names
    )


# Few values each, so that samples share them: near hashes, near texts, equal ranks but for the uid.
_HASHES = [0, 1, 3, 7, 15, 31, 2**63, 2**63 + 1, 2**64 - 1, 0xFF00FF00FF00FF00]
_CAPTIONS = [
    "a red cat",
    "A  RED cat",
    "a red cats",
    "a red car",
    "the blue dog",
    "blue dog",
    "",
    "x",
]
SAMPLE = st.fixed_dictionaries(
    {
        "image_hash": st.sampled_from([None, b"0" * 16, b"1" * 16]),
        "json.url": st.sampled_from([None, "http://a", "http://b", "http://a#x"]),
        "caption": st.sampled_from(_CAPTIONS),
        "phash": st.sampled_from(_HASHES),
        "colors": st.sampled_from([bytes([0] * 48), bytes([16] * 48), bytes([40] * 48)]),
        "width": st.integers(1, 2),
        "height": st.just(1),
        "key": st.sampled_from(["k", "k1", "l"]),
    }
)
TYPES = {
    "image_hash": pa.binary(16),
    "json.url": pa.string(),
    "caption": pa.string(),
    "phash": pa.uint64(),
    "colors": pa.binary(48),
    "width": pa.int32(),
    "height": pa.int32(),
    "key": pa.string(),
}


def table(samples):
    columns = {n: pa.array([s[n] for s in samples], t) for n, t in TYPES.items()}
    uids = [np.random.default_rng(i).bytes(16) for i in range(len(samples))]
    return pa.table({"uid": pa.array(uids, pa.binary(16)), **columns})


def is_linked(name, a, b):
    """Return whether two samples are linked, by the definition."""
    if name == "image":
        return a["image_hash"] is not None and a["image_hash"] == b["image_hash"]
    if name == "url":
        urls = [s["json.url"] and s["json.url"].split("#")[0] for s in (a, b)]
        return urls[0] is not None and urls[0] == urls[1]
    if name == "phash":
        apart = abs(a["colors"][0] - b["colors"][0])  # all parts have one colour here
        return (a["phash"] ^ b["phash"]).bit_count() <= DISTANCE and apart <= COLOR
    one, two = normalize_caption(a["caption"]), normalize_caption(b["caption"])
    if not one or not two:
        return False
    if name == "caption":
        return one == two
    bands = text_bands([one, two], SHINGLE, num_rows(JACCARD))
    first, second = shingles(one, SHINGLE), shingles(two, SHINGLE)
    similarity = len(first & second) / len(first | second)
    return bool((bands[0] == bands[1]).any()) and similarity >= JACCARD


def rank_of(sample):
    size = sample["width"] * sample["height"]
    return -size, -len(sample["caption"]), sample["key"].encode(), sample["uid"]


def by_definition(samples, names):
    """Return uid -> (position of the kind, uid of the best) of all that are dropped: O(n^2)."""
    dropped = {}
    for a in samples:
        for number, name in enumerate(names):
            better = [b for b in samples if is_linked(name, a, b) and rank_of(b) < rank_of(a)]
            if better:
                dropped[a["uid"]] = (number, min(better, key=rank_of)["uid"])
                break
    return dropped


def by_records(samples, names, *, num_shards=1, num_parts=1, seed=0):
    """Return the same, through records, partitions and shards in a random order."""
    kinds, found = kinds_of(names), []
    order = random.Random(seed)
    shards = [samples.take(np.arange(s, samples.num_rows, num_shards)) for s in range(num_shards)]
    for number, kind in enumerate(kinds):
        records = [make_records(kind, s, make_ranks(s, KEEP), i) for i, s in enumerate(shards)]
        order.shuffle(records)
        records = pa.concat_tables(records).combine_chunks()
        part = (records["high"].to_numpy() + records["low"].to_numpy()) % np.uint64(num_parts)
        for p in order.sample(range(num_parts), num_parts):
            some = records.filter(pa.array(part == p)).combine_chunks()
            dropped, cut = find_dropped(kind, number, some, 10**6)
            assert not len(cut)
            found.append(dropped)
    order.shuffle(found)
    rows = first_of_each(pa.concat_tables(found).combine_chunks()).to_pylist()
    assert all(
        row["rank"][-16:] in set(shards[row["shard"]]["uid"].to_pylist())
        and row["better"][-16:] in set(shards[row["better_shard"]]["uid"].to_pylist())
        for row in rows
    )
    return {row["rank"][-16:]: (row["kind"], row["better"][-16:]) for row in rows}


@pytest.mark.parametrize("names", [*[(name,) for name in ALL], ALL, ("text", "phash")])
@settings(max_examples=25, deadline=None)
@given(samples=st.lists(SAMPLE, max_size=24), parts=st.integers(1, 5), seed=st.integers(0, 9))
def test_who_is_dropped_is_what_the_definition_says(names, samples, parts, seed):
    samples = table(samples)
    expected = by_definition(samples.to_pylist(), names)
    assert by_records(samples, names) == expected
    assert by_records(samples, names, num_shards=3, num_parts=parts, seed=seed) == expected


def test_one_hop_and_no_chain():
    # b is near a, c is near b, c is not near a: a stays, b goes for a, c goes for b, which is gone.
    samples = table(
        [
            {"phash": h, "width": w, "height": 1, "caption": "c", "key": "k"}
            | {"image_hash": None, "json.url": None, "colors": bytes(48)}
            for h, w in ((0, 9), (0b111, 8), (0b111111, 7), (0b111111 << 20, 6))
        ]
    )
    a, b, c, _ = samples["uid"].to_pylist()
    assert by_records(samples, ("phash",)) == {b: (0, a), c: (0, b)}


def test_the_keep_policy_is_a_list_in_order_and_the_uid_has_the_last_word():
    samples = pa.table(
        {
            "uid": pa.array([bytes([9 - i]) * 16 for i in range(5)], pa.binary(16)),
            "key": ["b", "a", "ab", "a", "é"],
            "caption": ["long caption", "short", "short", "short", "short"],
            "width": [2, 3, 3, 3, 1],
            "height": [2, 1, 1, 1, 1],
        }
    )

    def order(*keep):
        ranks = make_ranks(samples, keep).to_pylist()
        return sorted(range(5), key=ranks.__getitem__)

    assert order("resolution", "key") == [0, 3, 1, 2, 4]
    assert order("caption_length", "resolution") == [0, 3, 2, 1, 4]
    assert order("key") == [3, 1, 2, 0, 4]
    assert order() == [4, 3, 2, 1, 0]


@given(st.integers(1, 16), st.data())
def test_hashes_within_the_distance_share_a_band(num_bands, data):
    edges = band_edges(num_bands)
    assert (edges[0], edges[-1]) == (0, HASH_BITS)
    assert (np.diff(edges) > 0).all()
    flips = data.draw(st.lists(st.integers(0, 63), max_size=num_bands - 1))
    touched = {int(np.searchsorted(edges, bit, side="right")) for bit in flips}
    assert len(touched) < num_bands


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=30), st.randoms())
def test_links_of_buckets_follow_their_definition(pairs, shuffle):
    bucket = np.array([b for b, _ in pairs], np.int64)
    item = np.array([i for _, i in pairs], np.int64)
    ranks = list(range(len(pairs)))
    shuffle.shuffle(ranks)
    rank = np.array(ranks, np.int64)

    def best(i, linked):
        found = [j for j in range(len(pairs)) if bucket[i] == bucket[j] and linked(i, j)]
        j = min(found, key=lambda j: rank[j])
        return j if rank[j] < rank[i] else -1

    equal = [best(i, lambda i, j: True) for i in range(len(pairs))]
    assert link_equal(bucket, rank).tolist() == equal
    near = [best(i, lambda i, j: abs(item[i] - item[j]) <= 1) for i in range(len(pairs))]
    found = link_near(
        bucket, rank, item, lambda a, b: abs(a[:, None] - b[None, :]) <= 1, max_band=99
    )
    assert found.better.tolist() == near


def test_a_bucket_above_the_cap_is_cut_to_its_best_and_reported():
    num = 1500  # more than are compared at once
    bucket, rank = np.zeros(num, np.int64), np.arange(num)
    item = np.arange(num) // 2  # pairs of equal items; the pairs 2k and 2k + 1 are near
    near = lambda a, b: (a[:, None] // 2) == (b[None, :] // 2)  # noqa: E731
    whole = link_near(bucket, rank, item, near, max_band=750)
    assert not len(whole.cut)
    assert whole.better.tolist() == [-1 if i % 4 == 0 else i // 4 * 4 for i in range(num)]
    cut = link_near(bucket, rank, item, near, max_band=100)
    assert cut.cut.tolist() == [750]
    # Equal items still go for their best; beyond the 100 best nobody is compared with.
    assert cut.better.tolist() == [
        whole.better[i] if i < 200 else (i - 1 if i % 2 else -1) for i in range(num)
    ]


def test_texts_that_just_have_the_similarity_are_missed_rarely():
    draw, missed, num = random.Random(1), 0, 400
    for _ in range(num):
        common = [draw.randbytes(3).hex() for _ in range(80)]
        sides = [[draw.randbytes(3).hex() for _ in range(10)] for _ in range(2)]
        # Shingles of one "character": J = 80 / 100.
        one, two = ("".join(chr(int(w, 16) % 60000 + 4096) for w in common + s) for s in sides)
        one, two = "".join(dict.fromkeys(one)), "".join(dict.fromkeys(two))
        bands = text_bands([one, two], 1, num_rows(0.8))
        missed += not (bands[0] == bands[1]).any()
    assert missed / num < 0.05
    near = NearTexts(["abcd", "abce", "abcd"], 1, 0.6)
    zero, one, two = np.array([0]), np.array([1]), np.array([2])
    assert near(zero, one).tolist() == [[True]]  # 3 / 5
    assert NearTexts(["abcd", "abce"], 1, 0.61)(zero, one).tolist() == [[False]]
    assert near(zero, two).tolist() == [[True]]


def test_captions_are_compared_without_case_width_and_blanks():
    same = ["Lemon SVG theme", " lemon  svg\ttheme\n", "ＬＥＭＯＮ svg theme"]
    assert len({caption_digest(caption) for caption in same}) == 1
    assert caption_digest("lemon svg themes") != caption_digest(same[0])
    assert caption_digest(" \n") is None


def test_rows_reach_who_they_are_for(tmp_path):
    givers = {}
    for giver, size in enumerate((0, 5, 40)):
        takers = np.random.default_rng(giver).integers(0, 9, size)
        rows = pa.table({"giver": [giver] * size, "taker": takers, "row": np.arange(size)})
        givers[tmp_path / f"{giver}.arrow"] = rows.cast(
            pa.schema([("giver", pa.int64()), ("taker", pa.int64()), ("row", pa.int64())])
        )
        give(tmp_path / f"{giver}.arrow", givers[tmp_path / f"{giver}.arrow"], takers)
    everything = pa.concat_tables(givers.values()).to_pylist()
    for taker in range(-1, 11):
        taken = take(list(givers), taker).to_pylist()
        assert taken == [row for row in everything if row["taker"] == taker]


def test_counts_of_captions_are_summed_over_shards():
    rows = list(product([1, 2, 3], range(3)))  # (low, shard)
    records = pa.table(
        {
            "high": pa.array([0] * 10, pa.uint64()),
            "low": pa.array([low for low, _ in rows] + [4], pa.uint64()),
            "count": pa.array([low for low, _ in rows] + [1], pa.int64()),
            "shard": pa.array([shard for _, shard in rows] + [0], pa.int32()),
        }
    )
    summed = sum_counts(records.take([*range(9, -1, -1)])).sort_by([("low", "ascending")])
    assert summed["count"].to_pylist() == [3] * 3 + [6] * 3 + [9] * 3  # 4 is there once


def test_an_image_that_does_not_decode_is_dropped_and_drops_nobody():
    samples = pa.table(
        {
            "uid": pa.array([b"a" * 16, b"b" * 16], pa.binary(16)),
            "phash": pa.array([None, 1], pa.uint64()),
        }
    )
    nobody = find_dropped(*_empty_records())[0]
    judgement = judge_dropped(samples, nobody, kinds_of(("phash", "image")))
    assert judgement.reasons.to_pylist() == ["cannot be decoded", None]


def _empty_records():
    (kind,) = kinds_of(("phash",))
    samples = table([])
    return kind, 0, make_records(kind, samples, make_ranks(samples, KEEP), 0), 10


def test_a_kind_twice_or_unknown_is_a_clear_error():
    with pytest.raises(ConfigError, match="twice"):
        global_rules["dedup"](by=("image", "image"))
    tree = {"name": "t", "output": "o", "sources": [{"name": "s", "shards": "x"}]}
    with pytest.raises(ConfigError, match=r"rules\.0"):
        validate({**tree, "rules": [{"name": "dedup", "by": ["sha"]}]}, CurateConfig, label="t")
