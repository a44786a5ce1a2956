"""Keep the samples with the best values of one column: a fraction of the pool."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.filters.base import Judgement, first_reason, needs_for
from curation.filters.score import read_numbers
from curation.global_rules.base import Pool, ShardPart, Solution, global_rules
from curation.global_rules.selection import Bound, Keys, key_of_float, select_smallest

NO_SCORE = "no score"
BELOW = "not in the top fraction"
_SCORE = "score"


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
    """The global rule; see `top_fraction`."""

    def __init__(
        self, column: str, fraction: float, *, keep: str = "highest", compat: str | None = None
    ) -> None:
        self._column, self._fraction, self._compat = column, fraction, compat
        self._keys_of = _keys_of if keep == "highest" else _keys_of_lowest
        # Columns that the scan must compute (columns.py), and `pairmill score`.
        self.needs, self.scored = needs_for(column)
        self.emit_digest = f"top_fraction {column}"
        self.solve_digest = f"{fraction} {keep} {compat}"

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return the scores."""
        scores = read_numbers(samples, self._column)
        return {_SCORE: pa.array(scores, mask=np.isnan(scores))}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Find the last (score, uid) that stays."""
        num_scored = sum(count for _, count in pool.map(_count, None, step="count"))
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

    `column` is one of the index (a score that `pairmill score` added, `width`, ...), a value of a
    rule before (`caption_length.words`), or `json.KEY`, a field of the sample's `.json`. Of n
    samples that reached the rule and have a score, floor(fraction * n) stay; equal scores are
    ordered by uid, so the number is exact and the result does not depend on the order of shards.
    A null or a score that is not finite is dropped as "no score".

    compat: datacomp reproduces the baselines' apply_filter.py: the threshold is the score at
    position int(n * fraction) from the top (from 0) and all scores >= it stay, which is one
    sample more, and all ties. (There fraction = 1 is an IndexError; here all stay.)
    """
    return TopFraction(column, fraction, keep=keep, compat=compat)
