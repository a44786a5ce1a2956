"""Find the metadata entries in captions, exactly as MetaCLIP does (arXiv:2309.16671, 2507.22062).

An entry matches iff it stands in the text between spaces, after seven punctuation marks were set
apart by spaces and tab, line feed and carriage return became spaces. No lower-casing, no joining
of spaces, no Unicode normalisation, nothing done to quotes, brackets or hyphens: so "St. Louis"
never matches. All entries count, nested ones too, each once a caption.

MetaCLIP 2 asks for the space before (after) an entry only where its first (last) character is of a
script that separates words by spaces: not where it is Han, Thai, Lao, Burmese, Khmer or Tibetan, or
one of the punctuation marks below. Kana and Hangul are not among them, as in the released code.

Aho-Corasick finds the entries in one pass over the text; overlapping matches are needed, since two
neighbouring entries share a space. Many captions are searched at once, as UTF-8 with a line feed
between them, which no spaced text holds; so the cost of a call is shared (tools/benchmark/matching
compares the libraries).
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ahocorasick_rs import BytesAhoCorasick

Spacing = Literal["v1", "v2"]
_PUNCTUATION = ",.;:?!`"
_BLANKS = "\t\n\r"
_SPACING = str.maketrans(
    {**{mark: f" {mark} " for mark in _PUNCTUATION}, **dict.fromkeys(_BLANKS, " ")}
)
# Of the text that is searched at once.
_CHUNK_CHARACTERS = 1 << 16
# Scripts written without spaces between words (first and last code points of Unicode's blocks).
_UNSPACED_BLOCKS = (
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3400, 0x4DBF),  # CJK Unified Ideographs Extension A
    (0x4E00, 0x9FFF),  # CJK Unified Ideographs
    (0xF900, 0xFAFF),  # CJK Compatibility Ideographs
    (0x20000, 0x2EBEF),  # CJK Unified Ideographs Extensions B to F
)
_UNSPACED_MARKS = frozenset(string.punctuation) | frozenset(
    "\uff0c\u3002\u3001\uff1b\uff1a\uff1f\uff01"  # comma, full stop, ... question, exclamation
    "\u201c\u201d\u2018\u2019\uff08\uff09\u3010\u3011"  # quotes, parentheses, lenticular brackets
    "\u300a\u300b\u3008\u3009\u300c\u300d\u300e\u300f\uff5e\u2014"  # brackets, tilde, em dash
)


def space_text(text: str) -> str:
    """Return the text in the form in which entries are looked up."""
    return f" {text} ".translate(_SPACING)


def is_unspaced(character: str) -> bool:
    """Return whether MetaCLIP 2 wants no space between this character and the text around it."""
    code = ord(character)
    return character in _UNSPACED_MARKS or any(a <= code <= b for a, b in _UNSPACED_BLOCKS)


def space_entry(entry: str, spacing: Spacing = "v1") -> str:
    """Return an entry in the form in which it is looked up."""
    before = "" if spacing == "v2" and is_unspaced(entry[0]) else " "
    after = "" if spacing == "v2" and is_unspaced(entry[-1]) else " "
    return f"{before}{entry}{after}"


class EntryMatcher:
    """Finds all entries of a metadata list in captions. Building one takes seconds for 500,000."""

    def __init__(self, entries: Sequence[str], spacing: Spacing = "v1") -> None:
        # A spaced text has no blank but the space.
        possible = [i for i, e in enumerate(entries) if not any(blank in e for blank in _BLANKS)]
        patterns = [
            space_entry(entries[i], spacing).encode("utf-8", "surrogatepass") for i in possible
        ]
        self._find = BytesAhoCorasick(patterns).find_matches_as_indexes if patterns else None
        self._ids = np.array(possible, np.int64)

    def match(self, captions: Sequence[str]) -> pa.ListArray:
        """Return the ids of the entries of each caption: list<int32>, ascending, each once."""
        pieces = list(self._pairs(captions))
        found = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        rows, ids = found >> 32, found & 0xFFFFFFFF
        offsets = np.searchsorted(rows, np.arange(len(captions) + 1))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32()))

    def _pairs(self, captions: Sequence[str]) -> Iterator[npt.NDArray[np.int64]]:
        """Yield (row of the caption << 32 | id), ascending, each once, for some captions a time."""
        first = 0
        while first < len(captions) and self._find:
            texts: list[str] = []
            size = 0
            while size < _CHUNK_CHARACTERS and first + len(texts) < len(captions):
                texts.append(captions[first + len(texts)])
                size += len(texts[-1])
            yield self._search(texts, first)
            first += len(texts)

    def _search(self, captions: Sequence[str], first: int) -> npt.NDArray[np.int64]:
        text = _space_texts(captions).encode("utf-8", "surrogatepass")
        assert self._find is not None
        matches = self._find(text, overlapping=True)
        flat = np.fromiter(chain.from_iterable(matches), np.int64, 3 * len(matches))
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
        rows = np.searchsorted(ends, flat[1::3]) + first
        pairs = rows << 32 | self._ids[flat[0::3]]
        pairs.sort()  # nearly in order already: faster than np.unique, which hashes
        is_first = np.ones(len(pairs), dtype=bool)
        np.not_equal(pairs[1:], pairs[:-1], out=is_first[1:])
        return pairs[is_first]


def _space_texts(captions: Sequence[str]) -> str:
    """Return `space_text` of all captions with a line feed between them.

    The same replacements, on all of them at once.
    """
    text = "\n".join(captions)
    if text.count("\n") >= len(captions):  # a line feed in a caption is a blank
        text = "\n".join([caption.replace("\n", " ") for caption in captions])
    text = text.replace("\n", " \n ").replace("\t", " ").replace("\r", " ")
    for mark in _PUNCTUATION:
        text = text.replace(mark, f" {mark} ")
    return f" {text} "
