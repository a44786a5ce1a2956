"""Drop captions that consist of digits for the most part: product numbers, prices, dates."""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.filters.base import Filter, Judgement, filters, first_reason

_NO_DIGIT = re.compile(r"\D+")  # decimal digits of any script count
_BLANK = re.compile(r"\s+")


@filters.register("digits")
def digits(*, max_share: Annotated[float, Field(ge=0, le=1)]) -> Filter:
    """Keep captions in which at most `max_share` of the characters but blanks are digits."""

    def share(caption: str) -> float:
        characters = len(_BLANK.sub("", caption))
        return len(_NO_DIGIT.sub("", caption)) / characters if characters else 0.0

    def judge(samples: pa.Table) -> Judgement:
        captions = samples["caption"].to_pylist()
        shares = np.fromiter(map(share, captions), np.float64, len(captions))
        tests = [("too many digits", shares > max_share)]
        return Judgement({"share": pa.array(shares)}, first_reason(len(captions), tests))

    return judge
