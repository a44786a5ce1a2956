"""Captions as sets of shingles, and the buckets in which similar ones meet (MinHash-LSH).

A. Broder, "On the resemblance and containment of documents" (1997): the share of hash functions
under which two sets have the same minimum estimates their Jaccard similarity J. P. Indyk and
R. Motwani (1998): cut into b bands of r minima, two sets share a band with 1 - (1 - J^r)^b.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from configs import draws
from curation.dedup.links import BoolArray, IntArray

NUM_PERMUTATIONS = 128
# Of pairs with exactly the wanted similarity.
_MAX_MISSED = 0.02
_TEXTS_AT_ONCE = 1024
UInt64Array = npt.NDArray[np.uint64]


def normalize_caption(caption: str) -> str:
    """Return a caption in NFKC, case folded, with single blanks and none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def shingles(text: str, size: int) -> frozenset[str]:
    """Return all runs of `size` characters; of a shorter text the text itself."""
    return frozenset(text[i : i + size] for i in range(max(1, len(text) - size + 1)))


def num_rows(min_jaccard: float) -> int:
    """Return r, the minima a band: the most that miss at most 2 % of pairs with that similarity."""
    missed = [
        (1 - min_jaccard**r) ** (NUM_PERMUTATIONS // r) for r in range(1, NUM_PERMUTATIONS + 1)
    ]
    return max((r for r, miss in enumerate(missed, 1) if miss <= _MAX_MISSED), default=1)


def text_bands(texts: Sequence[str], size: int, rows: int) -> UInt64Array:
    """Return the band hashes of texts: [n, NUM_PERMUTATIONS // rows]."""
    bands = NUM_PERMUTATIONS // rows
    minima = _minima(texts, size)[:, : bands * rows].reshape(len(texts), bands, rows)
    return draws.bits(0, "dedup/band", *np.moveaxis(minima, 2, 0))


def _minima(texts: Sequence[str], size: int) -> UInt64Array:
    """Return the minimum of each text's shingles under each hash function: [n, permutations].

    The functions are a * h + b mod 2^64, a odd, of a shingle's xxh3-64 h: bijections.
    """
    numbers = np.arange(NUM_PERMUTATIONS, dtype=np.uint64)
    factor = draws.bits(0, "dedup/factor", numbers) | np.uint64(1)
    shift = draws.bits(0, "dedup/shift", numbers)
    minima = np.empty((NUM_PERMUTATIONS, len(texts)), np.uint64)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        sets = [shingles(text, size) for text in texts[start : start + _TEXTS_AT_ONCE]]
        flat = [xxhash.xxh3_64_intdigest(s.encode("utf-8", "replace")) for f in sets for s in f]
        hashes = np.array(flat, np.uint64)
        starts = np.cumsum([0, *map(len, sets[:-1])])
        for row in range(NUM_PERMUTATIONS):  # all at once would be slower by far: out of the cache
            hashed = hashes * factor[row] + shift[row]
            minima[row, start : start + len(sets)] = np.minimum.reduceat(hashed, starts)
    return minima.T


class NearTexts:
    """Which of some texts have a Jaccard similarity of at least `min_jaccard`."""

    def __init__(self, texts: Sequence[str], size: int, min_jaccard: float) -> None:
        self._texts, self._size, self._min = texts, size, min_jaccard
        self._sets: dict[int, frozenset[str]] = {}

    def _set(self, item: int) -> frozenset[str]:
        if item not in self._sets:
            self._sets[item] = shingles(self._texts[item], self._size)
        return self._sets[item]

    def __call__(self, a: IntArray, b: IntArray) -> BoolArray:
        """Return [len(a), len(b)]."""
        sets_a, sets_b = [self._set(int(i)) for i in a], [self._set(int(i)) for i in b]
        sizes_a, sizes_b = np.array([*map(len, sets_a)]), np.array([*map(len, sets_b)])
        smaller = np.minimum(sizes_a[:, None], sizes_b[None, :])
        larger = np.maximum(sizes_a[:, None], sizes_b[None, :])
        is_near: BoolArray = smaller / larger >= self._min  # what J is at most
        for row, column in zip(*np.nonzero(is_near), strict=True):
            common = len(sets_a[row] & sets_b[column])
            union = len(sets_a[row]) + len(sets_b[column]) - common
            is_near[row, column] = common / union >= self._min
        return is_near
