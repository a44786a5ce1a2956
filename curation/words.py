"""Count words of captions for the report, in bounded memory.

A pool of billions has tens of millions of different words. Beyond MAX_WORDS of them only those are
counted whose hash falls into 1/2, 1/4, ... of its range: which ones does not depend on the order of
the shards, and each that is counted is counted whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

MAX_WORDS = 2_000_000
MAX_CURVE_POINTS = 200
_WORD = re.compile(r"\w+")


def words_of(caption: str) -> list[str]:
    """Return the words of a caption, lower-cased, as often as they stand there."""
    return _WORD.findall(caption.lower())


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Return how often each word stands in some captions."""
    return Counter(chain.from_iterable(map(words_of, captions)))


def frequency_curve(counts: npt.NDArray[np.int64]) -> list[list[int]]:
    """Return up to 200 points (rank from 1, count) of the counts above 0, largest first.

    The ranks are spaced evenly on a logarithmic scale; the first and the last are always there.
    """
    ranked = np.sort(counts[counts > 0])[::-1]
    if not len(ranked):
        return []
    ranks = np.unique(np.geomspace(1, len(ranked), MAX_CURVE_POINTS).round().astype(np.int64))
    return [[int(rank), int(ranked[rank - 1])] for rank in ranks]


class WordCounts:
    """Sums word counts of shards; beyond `max_words` words it keeps a fixed share of them."""

    def __init__(self, max_words: int = MAX_WORDS) -> None:
        self._max_words = max_words
        self._counts: Counter[str] = Counter()
        self._num_words = 0
        self._level = 0  # 1/2**level of the words are counted

    def add(self, counts: Counter[str]) -> None:
        """Add the counts of one shard."""
        self._num_words += counts.total()
        if self._level:
            counts = Counter({w: n for w, n in counts.items() if self._is_counted(w)})
        self._counts.update(counts)
        while len(self._counts) > self._max_words:
            self._level += 1
            self._counts = Counter({w: n for w, n in self._counts.items() if self._is_counted(w)})

    def _is_counted(self, word: str) -> bool:
        return not self._level or xxhash.xxh3_64_intdigest(word.encode()) >> (64 - self._level) == 0

    def summary(self, num_top: int) -> dict[str, Any]:
        """Return totals, the most frequent words, and the frequency curve."""
        top = sorted(self._counts.items(), key=lambda pair: (-pair[1], pair[0]))[:num_top]
        return {
            "num_words": self._num_words,
            "num_distinct": len(self._counts) << self._level,
            "fraction_counted": 2.0**-self._level,
            "top": [[word, count] for word, count in top],
            "curve": frequency_curve(np.array(list(self._counts.values()), np.int64)),
        }
