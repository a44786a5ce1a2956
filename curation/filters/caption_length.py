"""Drop captions with too few or too many words or characters."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.filters.base import Filter, Judgement, filters, first_reason

Count = Annotated[int, Field(ge=0)]


@filters.register("caption_length")
def caption_length(
    *,
    min_words: Count = 0,
    max_words: Count | None = None,
    min_characters: Count = 0,
    max_characters: Count | None = None,
) -> Filter:
    """Keep captions whose length lies within the bounds, both ends included.

    Words are what white space separates (`str.split`), characters are Unicode code points, as in
    DataComp's basic filter (arXiv:2304.14108, its released code): that filter's "more than 2 words
    and more than 5 characters" is min_words: 3, min_characters: 6.
    """

    def judge(samples: pa.Table) -> Judgement:
        captions = samples["caption"].to_pylist()
        words = np.fromiter((len(c.split()) for c in captions), np.int32, len(captions))
        characters = np.fromiter((len(c) for c in captions), np.int32, len(captions))
        tests = [("too few words", words < min_words)]
        if max_words is not None:
            tests.append(("too many words", words > max_words))
        tests.append(("too few characters", characters < min_characters))
        if max_characters is not None:
            tests.append(("too many characters", characters > max_characters))
        values = {"words": pa.array(words), "characters": pa.array(characters)}
        return Judgement(values, first_reason(len(captions), tests))

    return judge
