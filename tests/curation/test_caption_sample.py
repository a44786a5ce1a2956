"""The report's sample of captions does not depend on shards, and does not grow with the pool."""

import hashlib

import numpy as np

from curation.caption_sample import (
    MAX_CHARACTERS,
    NUM_CAPTIONS,
    first_captions,
    sample_captions,
    summarize_captions,
)

NUM = 5 * NUM_CAPTIONS
UIDS = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(NUM)]
CAPTIONS = [None if i % 10 == 0 else f"caption number {i} " + "x" * i for i in range(NUM)]
READABLE = np.arange(NUM) % 10 > 0
OUTCOMES = ["no image" if i % 10 == 0 else "kept" if i % 3 else "rule/why" for i in range(NUM)]


def sampled(size: int) -> tuple[list, int]:
    """Return the sample of the pool in shards of `size`, and how much the shards handed over."""
    parts = [
        sample_captions(
            UIDS[i : i + size], CAPTIONS[i : i + size], OUTCOMES[i : i + size],
            READABLE[i : i + size],
            seed=3, num_in_pool=NUM,
        )
        for i in range(0, NUM, size)
    ]  # fmt: skip
    found = []
    for part in reversed(parts):
        found = first_captions([*found, *part])
    return found, sum(map(len, parts))


def test_the_sample_is_the_same_however_the_pool_is_cut():
    one, _ = sampled(NUM)
    many, handed_over = sampled(61)
    assert one == many
    assert len(one) == NUM_CAPTIONS
    assert handed_over < 2.2 * NUM_CAPTIONS
    assert {outcome for *_, outcome in one} == {"kept", "rule/why"}  # nothing unreadable
    assert max(len(caption) for _, _, caption, _ in one) == MAX_CHARACTERS


def test_languages_are_counted_before_and_after_and_the_doubtful_are_unclear():
    texts = [
        ("A photograph of a red house on a hill in the evening sun", "kept"),
        ("Ein Foto von einem roten Haus auf einem Huegel am Abend", "kept"),
        ("Das ist eine Katze auf dem Sofa in der Wohnung", "rule/why"),
        ("x7", "kept"),
    ]
    found = summarize_captions([(i, "", text, out) for i, (text, out) in enumerate(texts)], "kept")
    before, after = found["languages"]["before"], found["languages"]["after"]
    assert before == {"de": 2, "en": 1, "unclear": 1}
    assert after == {"de": 1, "en": 1, "unclear": 1}
    assert found["caption_sample"][2] == [texts[2][0], "rule/why", "de"]
