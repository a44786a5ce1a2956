"""Drop samples by a threshold on a number: a score, a size, a field of the `.json`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ConfigError, UsageError, did_you_mean
from curation.columns import JSON_PREFIX
from curation.filters.base import (
    Filter,
    Judgement,
    filters,
    first_reason,
    needing,
    needs_for,
)


def read_numbers(samples: pa.Table, column: str) -> npt.NDArray[np.float64]:
    """Return a column of numbers; NaN where it is null, not finite, or (json.KEY) no number.

    Raises:
        UsageError: there is no such column, or it holds no numbers.
    """
    if column not in samples.column_names:
        raise UsageError(
            f"no column is called {column!r}{did_you_mean(column, samples.column_names)} The "
            f"index and the rules before have: {', '.join(samples.column_names)}. `pairmill score` "
            "adds score columns; json.KEY is a field of the sample's .json."
        )
    values = samples[column].combine_chunks()
    if column.startswith(JSON_PREFIX):
        return np.fromiter(map(_number, values.to_pylist()), np.float64, len(values))
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise UsageError(f"column {column!r} holds {values.type}; a score must be a number.")
    numbers = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _number(text: str | None) -> float:
    try:
        number = float(text) if text is not None else np.nan
    except ValueError:
        return np.nan
    return number if np.isfinite(number) else np.nan


@filters.register("score")
def score(*, column: str, min: float | None = None, max: float | None = None) -> Filter:
    """Keep samples whose number in `column` lies within min and max, both ends included.

    `column` is one of the index (a score that `pairmill score` added, width, ...), a value of a
    rule before (`language.confidence`), or `json.KEY` for a field of the sample's `.json`, such as
    json.similarity of img2dataset. A sample without a number is dropped as "no score".

    LAION-400M is column: clip_b32_similarity, min: 0.3. For the best share of a pool see
    `top_fraction`.
    """
    if min is None and max is None:
        raise ConfigError(f"score: give `min` or `max` of {column!r}, or both.")

    def judge(samples: pa.Table) -> Judgement:
        numbers = read_numbers(samples, column)
        tests = [("no score", np.isnan(numbers))]
        if min is not None:
            tests.append(("score too low", numbers < min))
        if max is not None:
            tests.append(("score too high", numbers > max))
        value = pa.array(numbers, mask=np.isnan(numbers))
        return Judgement({"value": value}, first_reason(len(numbers), tests))

    needs, scored = needs_for(column)
    return needing(needs, judge, scored=scored)
