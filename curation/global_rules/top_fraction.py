"""Keep the samples with the best values of one column: a fraction of the pool."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from configs.errors import UsageError, did_you_mean
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import Pool, ShardPart, Solution, global_rules
from curation.global_rules.selection import Bound, Keys, key_of_float, select_smallest

NO_SCORE = "no score"
BELOW = "not in the top fraction"
_SCORE = "score"


def scores_of(samples: pa.Table, column: str) -> npt.NDArray[np.float64]:
    """Return a numeric column of the samples; NaN where it is null or not finite.

    Raises:
        UsageError: there is no such column, or it holds no numbers.
    """
    if column not in samples.column_names:
        known = ", ".join(samples.column_names)
        raise UsageError(
            f"no column is called {column!r}{did_you_mean(column, samples.column_names)} The index "
            f"and the rules before have: {known}. `pairmill score` adds score columns."
        )
    values = samples[column].combine_chunks()
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise UsageError(f"column {column!r} holds {values.type}; a score must be a number.")
    floats = pc.cast(values, pa.float64(), safe=False)
    scores: npt.NDArray[np.float64] = floats.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.where(np.isfinite(scores), scores, np.nan)


def num_wanted(num_samples: int, fraction: float) -> int:
    """Return floor(fraction * n); the epsilon mends products such as 0.29 * 100 = 28.999..."""
    return min(num_samples, math.floor(num_samples * fraction * (1 + 1e-12)))


def _keys_of(part: ShardPart) -> Keys:
    """Return the best first: keys of the negated scores."""
    table = part.emitted(_SCORE)
    table = table.filter(table[_SCORE].is_valid()).combine_chunks()
    scores = table[_SCORE].to_numpy(zero_copy_only=False)
    return Keys("", key_of_float(-scores), table["uid"].combine_chunks())


def _keys_of_lowest(part: ShardPart) -> Keys:
    found = _keys_of(part)
    return Keys(found.group, ~found.keys, found.uids)


def _count(part: ShardPart, argument: None) -> int:
    return len(_keys_of(part).keys)


class TopFraction:
    """See `top_fraction`; other rules that rank samples make their scores and use it."""

    def __init__(
        self, column: str, fraction: float, *, keep: str = "highest", compat: str | None = None
    ) -> None:
        self._column, self._fraction, self._compat = column, fraction, compat
        self._keys_of = _keys_of if keep == "highest" else _keys_of_lowest
        self.emit_digest = f"top_fraction {column}"
        self.solve_digest = f"{fraction} {keep} {compat}"

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return the scores."""
        scores = scores_of(samples, self._column)
        return {_SCORE: pa.array(scores, mask=np.isnan(scores))}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Find the last (score, uid) that stays."""
        num_scored = sum(count for _, count in pool.map(_count, None, step="count"))
        return self.solve_scored(pool, num_scored)

    def solve_scored(self, pool: Pool, num_scored: int) -> dict[str, Any]:
        """Find the last (score, uid) that stays among the samples that have a score."""
        k = num_wanted(num_scored, self._fraction)
        if self._compat == "datacomp":
            k = min(num_scored, int(num_scored * self._fraction) + 1)
        content: dict[str, Any] = {"num_scored": num_scored, "num_wanted": k, "bound": None}
        if k:
            bound = select_smallest(pool, self._keys_of, {"": num_scored}, {"": k})[""]
            ties = "f" * 32 if self._compat == "datacomp" else bound.uid
            content["bound"] = [bound.key, ties]
        return content

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop what is behind the bound."""
        has_score = part.emitted(_SCORE)[_SCORE].combine_chunks().is_valid()
        is_kept = has_score.to_numpy(zero_copy_only=False).copy()
        found = self._keys_of(part)
        bound = solution.values["bound"]
        held = Bound(*bound).holds(found.keys, found.uids) if bound else False
        no_score = ~is_kept
        is_kept[is_kept] = held
        return Judgement({}, first_reason(len(is_kept), [(NO_SCORE, no_score), (BELOW, ~is_kept)]))


@global_rules.register("top_fraction")
def top_fraction(
    *,
    column: str,
    fraction: Annotated[float, Field(gt=0, le=1)],
    keep: Literal["highest", "lowest"] = "highest",
    compat: Literal["datacomp"] | None = None,
) -> TopFraction:
    """Keep a fraction of the samples: those with the highest (or lowest) values of a column.

    `column` is one of the index (a score that `pairmill score` added, `width`, ...) or a value of
    a rule before (`caption_length.words`). Of n samples that reached the rule and have a score,
    floor(fraction * n) stay; equal scores are ordered by uid, so the number is exact and the
    result does not depend on the order of shards. A null or a score that is not finite is dropped
    as "no score".

    compat: datacomp reproduces the baselines' apply_filter.py: the threshold is the score at
    position int(n * fraction) from the top (from 0) and all scores >= it stay, which is one
    sample more, and all ties. (There fraction = 1 is an IndexError; here all stay.)
    """
    return TopFraction(column, fraction, keep=keep, compat=compat)
