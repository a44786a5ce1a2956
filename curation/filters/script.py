"""Drop captions that are written in other scripts."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from configs.errors import ConfigError
from curation.filters.base import Filter, Judgement, filters, first_reason

# Digits, punctuation, blanks and most symbols are common to all scripts and count for none.
_NEUTRAL = r"[\p{Script=Common}\p{Script=Inherited}\p{Script=Unknown}]+"


@filters.register("script")
def script(
    *,
    keep: Annotated[tuple[str, ...], Field(min_length=1)],
    min_share: Annotated[float, Field(gt=0, le=1)] = 0.5,
) -> Filter:
    """Keep captions of whose letters at least `min_share` belong to the scripts in `keep`.

    Names are those of Unicode's Script property (UAX #24): Latin, Cyrillic, Greek, Han, Hiragana,
    Katakana, Hangul, Arabic, Hebrew, Devanagari, Thai, ... A caption without a letter of any
    script is dropped as "no letters".
    """
    import regex  # not at the top: a job without this rule does not wait for it

    for name in keep:
        try:
            regex.compile(rf"\p{{Script={name}}}")
        except regex.error:
            raise ConfigError(
                f"script: there is no script {name!r}. Expected names of Unicode's Script "
                "property, such as Latin, Cyrillic, Han, Hiragana, Katakana, Hangul, Arabic."
            ) from None
    neutral = regex.compile(_NEUTRAL)
    others = regex.compile("[^" + "".join(rf"\p{{Script={name}}}" for name in keep) + "]+")

    def share(caption: str) -> float:
        letters = neutral.sub("", caption)
        return len(others.sub("", letters)) / len(letters) if letters else np.nan

    def judge(samples: pa.Table) -> Judgement:
        captions = samples["caption"].to_pylist()
        shares = np.fromiter(map(share, captions), np.float64, len(captions))
        no_letters = np.isnan(shares)
        tests = [("no letters", no_letters), ("other script", ~(shares >= min_share))]
        values = {"share": pa.array(shares, mask=no_letters)}
        return Judgement(values, first_reason(len(captions), tests))

    return judge
