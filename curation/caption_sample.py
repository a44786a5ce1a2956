"""A sample of captions for the report: to be searched, and to tell by which languages there are.

A caption is taken by the hash of its uid alone, so the sample depends neither on shards nor on the
order. A shard hands over the captions below a hash at which twice as many as wanted are expected of
the whole pool: what goes over the wire does not grow with the number of shards.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from configs import draws

NUM_CAPTIONS = 2000
MAX_CHARACTERS = 300
MIN_CONFIDENCE = 0.5
UNCLEAR = "unclear"
Sampled = tuple[int, str, str, str]  # hash of uid, uid (hex), caption, outcome


def sample_captions(
    uids: Sequence[bytes],
    captions: npt.ArrayLike,
    outcomes: npt.ArrayLike,
    is_readable: npt.NDArray[np.bool_],
    *,
    seed: int,
    num_in_pool: int,
) -> list[Sampled]:
    """Return what one shard hands over; one entry a sample, what is not readable is left out."""
    if not len(uids):
        return []
    rank_n = draws.bits(seed, "report/caption", *draws.uid_words(uids))
    highest = min((1 << 64) * 2 * NUM_CAPTIONS // max(num_in_pool, 1), (1 << 64) - 1)
    found = []
    captions, outcomes = np.asarray(captions, object), np.asarray(outcomes, object)
    for i in np.flatnonzero((rank_n <= np.uint64(highest)) & is_readable).tolist():
        caption = str(captions[i])[:MAX_CHARACTERS]
        found.append((int(rank_n[i]), uids[i].hex(), caption, str(outcomes[i])))
    return first_captions(found)


def first_captions(captions: Any) -> list[Sampled]:
    """Return the first of all captions by hash."""
    return heapq.nsmallest(NUM_CAPTIONS, captions, key=lambda found: found[:2])


def summarize_captions(sampled: Sequence[Sampled], kept: str) -> dict[str, Any]:
    """Return the report's `caption_sample` and `languages` (docs/formats.md)."""
    from curation.filters.language import likeliest_languages  # not in a worker

    codes, confidences = likeliest_languages([caption for _, _, caption, _ in sampled])
    languages = [
        code if confidence >= MIN_CONFIDENCE else UNCLEAR
        for code, confidence in zip(codes, confidences, strict=True)
    ]
    outcomes = [outcome for *_, outcome in sampled]
    after = Counter(x for x, out in zip(languages, outcomes, strict=True) if out == kept)
    before = Counter(languages)
    ordered = sorted(before, key=lambda code: (-before[code], code))
    return {
        "languages": {
            "min_confidence": MIN_CONFIDENCE,
            "before": {code: before[code] for code in ordered},
            "after": {code: after[code] for code in ordered},
        },
        "caption_sample": [
            [caption, outcome, language]
            for (_, _, caption, outcome), language in zip(sampled, languages, strict=True)
        ],
    }
