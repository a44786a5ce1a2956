"""Drop samples by patterns in a text column."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ConfigError
from curation.columns import JSON_PREFIX
from curation.filters.base import Filter, Judgement, filters, first_reason, needing


@filters.register("regex")
def regex(
    *,
    drop: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    column: str = "caption",
    ignore_case: bool = False,
) -> Filter:
    """Drop samples in whose `column` one of the `drop` patterns is found, or none of `keep`.

    The patterns are RE2's (linear in the text, whatever the pattern; no look-around, no
    back-references), searched anywhere: anchor with ^ and $. `column` is a text of the index:
    caption, key, image_ext, or json.KEY for a field of the sample's `.json`. A null matches
    nothing.
    """
    if not drop and not keep:
        raise ConfigError("regex: give patterns to `drop`, or to `keep`, or both.")
    for pattern in (*drop, *keep):
        try:
            pc.match_substring_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"regex: {pattern!r} is no pattern of RE2: {error}.") from None

    def found(texts: pa.Array, patterns: tuple[str, ...]) -> pa.Array:
        matches = pa.array([False] * len(texts), pa.bool_())
        for pattern in patterns:
            one = pc.match_substring_regex(texts, pattern, ignore_case=ignore_case)
            matches = pc.or_(matches, pc.fill_null(one, False))
        return matches.to_numpy(zero_copy_only=False)

    def judge(samples: pa.Table) -> Judgement:
        texts = samples[column].combine_chunks()
        tests = [("pattern found", found(texts, drop))]
        if keep:
            tests.append(("no pattern found", ~found(texts, keep)))
        return Judgement({}, first_reason(len(texts), tests))

    return needing({column} if column.startswith(JSON_PREFIX) else (), judge)
