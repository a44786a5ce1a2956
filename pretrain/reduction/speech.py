"""Parts of speech by Brill's tagger, as TextBlob ships it (MIT; no download): nouns 1, adjectives
2, verbs 3, the rest 4.

CLIPA used NLTK's perceptron tagger, whose model is a download. Where the two disagree, another
word stays; both tag English.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

_RANKS = {"NN": 1, "JJ": 2, "VB": 3}
_OTHER = 4


def ranks_of_entries(entries: Iterable[str]) -> npt.NDArray[np.int8]:
    """Return the rank of each vocabulary entry, tagged alone; pieces of words are their letters."""
    tagger = _tagger()
    return np.asarray([_rank(tagger, [entry])[0] for entry in entries], dtype=np.int8)


@lru_cache(maxsize=65_536)
def ranks_in_caption(words: tuple[str, ...]) -> npt.NDArray[np.int8]:
    """Return the rank of each word, tagged in their caption."""
    return np.asarray(_rank(_tagger(), words), dtype=np.int8)


def _rank(tagger: Any, words: Sequence[str]) -> list[int]:
    if not words:
        return []
    tagged = tagger.find_tags(list(words))
    return [
        _RANKS.get(tag[:2], _OTHER) if any(map(str.isalnum, word)) else _OTHER
        for word, (_, tag) in zip(words, tagged, strict=True)
    ]


@lru_cache(maxsize=1)
def _tagger() -> Any:
    from textblob.en import parser

    return parser
