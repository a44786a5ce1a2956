"""The CLIP score of a caption without its digits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tools.score.base import Batch, Column, Score, scores

_DIGITS = re.compile(r"\d+")  # decimal digits of any script
_BLANK = re.compile(r"\s+")


def mask_digits(caption: str, replacement: str = "") -> str:
    """Return the caption with each run of decimal digits replaced, runs of blanks made one."""
    return _BLANK.sub(" ", _DIGITS.sub(lambda run: replacement, caption)).strip()


class _MaskedDigits(Score):
    uses_model = True

    def __init__(self, column: str, replacement: str) -> None:
        super().__init__(columns={"column": column})
        self._replacement = replacement

    def score(self, batch: Batch) -> Mapping[str, Any]:
        texts = [mask_digits(caption, self._replacement) for caption in batch.captions]
        return {self.columns["column"]: batch.paired(batch.images, batch.texts(texts))}


@scores.register("clip_score_masked_digits")
def clip_score_masked_digits(
    *, column: Column = "clip_score_masked_digits", replacement: str = ""
) -> Score:
    """CLIP score of the caption with its numbers taken out ("Devil in the Number", 2309.13770).

    Numbers in a caption raise CLIP's score where they can be read in the picture, and lower it
    where not. Each run of decimal digits (of any script) becomes `replacement`; what runs of blanks
    that leaves become one. The paper thresholds this score, best at the top 40 %.
    """
    return _MaskedDigits(column, replacement)
