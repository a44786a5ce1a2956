"""How much of a caption is written in its picture, and the CLIP score without that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Annotated, Any

import regex
from pydantic import Field

from tools.score.base import Batch, Column, Picture, Score, scores

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
# A reader of text may lose the blanks between words; shorter words are found in too much.
_MIN_GLUED = 4


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters, marks and numbers, without case."""
    return [str(word) for word in _WORD.findall(text.casefold())]


def overlap(caption: str, lines: Sequence[str], min_similarity: float) -> float:
    """Return the share of a caption's words, each occurrence counted, that the lines hold.

    A word is held if a word of the lines is as similar as `min_similarity` (2 M / T: M equal
    characters in order of T in both), or if it has 4 characters and more and a line without its
    blanks contains it. A caption without words: 0.
    """
    words = words_of(caption)
    if not words or not lines:
        return 0.0
    seen = {word for line in lines for word in words_of(line)}
    glued = ["".join(words_of(line)) for line in lines]
    held = {word: _is_held(word, seen, glued, min_similarity) for word in set(words)}
    return sum(held[word] for word in words) / len(words)


def _is_held(word: str, seen: set[str], glued: list[str], min_similarity: float) -> bool:
    if word in seen or (len(word) >= _MIN_GLUED and any(word in line for line in glued)):
        return True
    if min_similarity == 1:
        return False
    for other in sorted(seen):
        longest = 2 * min(len(word), len(other)) / (len(word) + len(other))
        if longest >= min_similarity:
            ratio = SequenceMatcher(None, word, other, autojunk=False).ratio()
            if ratio >= min_similarity:
                return True
    return False


class _TextOverlap(Score):
    uses_ocr = True

    def __init__(self, columns: dict[str, str | None], min_similarity: float) -> None:
        super().__init__(columns=columns)
        self._min_similarity = min_similarity

    def look(self, picture: Picture) -> Mapping[str, float]:
        found = {}
        if "column" in self.columns:
            lines = [region.text for region in picture.regions]
            found[self.columns["column"]] = overlap(picture.caption, lines, self._min_similarity)
        if "area" in self.columns:
            from tools.score.ocr import area_share

            found[self.columns["area"]] = area_share(picture.image.size, picture.regions)
        return found


@scores.register("text_overlap")
def text_overlap(
    *,
    column: Column | None = "text_overlap",
    area: Column | None = "text_area",
    min_similarity: Annotated[float, Field(gt=0, le=1)] = 0.8,
) -> Score:
    """Share of the caption's words that stand in the picture ("parrot captions", arXiv:2312.14232).

    Models learn to read such pairs rather than to see. The text is read by RapidOCR (ocr.py); words
    match as `overlap` says. `area` is the share of the picture that boxes around text take. Needs
    `pip install 'pairmill[ocr]'`.
    """
    return _TextOverlap({"column": column, "area": area}, min_similarity)


class _TextMasked(Score):
    uses_model = True
    uses_masked = True

    def score(self, batch: Batch) -> Mapping[str, Any]:
        return {self.columns["column"]: batch.paired(batch.masked_images, batch.texts())}


@scores.register("clip_score_text_masked")
def clip_score_text_masked(*, column: Column = "clip_score_text_masked") -> Score:
    """CLIP score of the picture with the text in it painted over (T-MARS, arXiv:2307.03132).

    Boxes around text get the mean colour of what surrounds them; pairs whose only bond is the text
    fall, and those that also show what they say stay. T-MARS keeps the better half. (Its detector
    is FAST; here it is RapidOCR's.) A picture without text has its CLIP score. Needs
    `pip install 'pairmill[ocr]'`.
    """
    return _TextMasked(columns={"column": column})
