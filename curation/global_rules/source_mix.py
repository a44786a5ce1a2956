"""Mix sources: the last step of a job whose sources have a `weight` or a `cap`.

    q_s = min(n_s, cap_s, floor(w_s * r)),  r = min over weighted sources of min(n_s, cap_s) / w_s

n_s samples of source s are left by all rules. Sources with a weight stand in the dataset in the
proportion of their weights, as large as the scarcest of them allows; one without is only capped.
Which samples stay is drawn by hash of (seed, uid): exactly quota_s of them, whatever the workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs import draws
from configs.errors import DataError
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import Pool, ShardPart, Solution
from curation.global_rules.selection import Bound, Keys, select_smallest

SOURCES = "sources"
REASON = "above the quota of its source"


def quotas(
    num_left: Mapping[str, int], sources: Mapping[str, tuple[float | None, int | None]]
) -> dict[str, int]:
    """Return how many samples of each source stay; `sources`: name -> (weight, cap)."""
    capped = {
        name: min(num, cap) if (cap := sources[name][1]) is not None else num
        for name, num in num_left.items()
    }
    weights = {name: w for name in capped if (w := sources[name][0]) is not None}
    if weights:
        scarcest = min(weights, key=lambda name: (capped[name] / weights[name], name))
        scale = capped[scarcest] / weights[scarcest]
        for name, weight in weights.items():
            # The epsilon mends quotients such as 0.29 * 100 = 28.999...
            wanted = math.floor(weight * scale * (1 + 1e-12))
            capped[name] = capped[name] if name == scarcest else min(capped[name], wanted)
    return capped


def _drawn(seed: int, uids: pa.Array) -> npt.NDArray[np.uint64]:
    return draws.bits(seed, "sources/draw", *draws.uid_words(uids.to_pylist()))


def _keys_of(part: ShardPart) -> Keys:
    uids = part.emitted()["uid"].combine_chunks()
    return Keys(part.place.source, _drawn(part.seed, uids), uids)


def _count(part: ShardPart, argument: None) -> tuple[str, int]:
    return part.place.source, part.num_samples


class SourceMix:
    """The global rule; `sources`: name -> (weight, cap)."""

    def __init__(self, sources: Mapping[str, tuple[float | None, int | None]]) -> None:
        self._sources = dict(sources)
        self.emit_digest = SOURCES
        self.solve_digest = f"{sorted(self._sources.items())}"

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Nothing but the uid is needed."""
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Return quotas and bounds of the sources."""
        num_left = dict.fromkeys(self._sources, 0)
        for _, (source, count) in pool.map(_count, None, step="count"):
            num_left[source] += count
        for name, (weight, cap) in self._sources.items():
            if weight is not None and not num_left[name] and cap != 0:
                raise DataError(
                    f"source {name!r} has a weight, but no sample of it is left by the rules, so "
                    "that no mix has its share. Loosen the rules, or leave out the weight."
                )
        quota = quotas(num_left, self._sources)
        cut = {name: q for name, q in quota.items() if 0 < q < num_left[name]}
        bounds = select_smallest(pool, _keys_of, num_left, cut)
        return {
            "sources": {
                name: {"num_before": num_left[name], "quota": quota[name]} for name in num_left
            },
            "bounds": {name: list(bound) for name, bound in bounds.items()},
        }

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop what is above the quota."""
        source = part.place.source
        uids = part.emitted()["uid"].combine_chunks()
        bound = solution.values["bounds"].get(source)
        if bound is not None:
            is_kept = Bound(*bound).holds(_drawn(part.seed, uids), uids)
        else:
            is_kept = np.full(len(uids), solution.values["sources"][source]["quota"] > 0)
        return Judgement({}, first_reason(len(uids), [(REASON, ~is_kept)]))
