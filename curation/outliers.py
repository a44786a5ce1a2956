"""Which samples stand at the far end of what a rule measured, for the report.

`poison` by its score, `clusters` by how far a sample lies from its centroid. A shard hands over
what can be among the first of the whole pool, so that merging them in any order is exact.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.repeats import reference

if TYPE_CHECKING:  # a worker does not need it, and it takes long to import
    from curation.config import CurateConfig

NUM_OUTLIERS = 24
# Rule -> its value, and whether the largest or the smallest stand out.
_VALUES = {"poison": ("score", "highest"), "clusters": ("similarity", "lowest")}


class Outlier(NamedTuple):
    """A sample, by how far out it stands; ties are decided by uid."""

    rank: float
    uid: str
    reference: dict[str, Any]  # with its `value` and `outcome`


Outliers = dict[str, list[Outlier]]  # column of the decisions -> the furthest first


@dataclass(frozen=True)
class OutlierRules:
    """The columns of the decisions that are looked at: (LABEL.VALUE, highest or lowest)."""

    columns: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, config: CurateConfig) -> OutlierRules:
        """Return those of a job."""
        named = zip(config.rule_labels(), config.rules, strict=True)
        return cls(
            tuple(
                (f"{label}.{_VALUES[rule.name][0]}", _VALUES[rule.name][1])
                for label, rule in named
                if rule.name in _VALUES
            )
        )


def shard_outliers(
    shard: str,
    index: pa.Table,
    decisions: pa.Table,
    rules: OutlierRules,
    outcomes: npt.NDArray[Any],
) -> Outliers:
    """Return the outliers of one shard; `outcomes`: "kept" or why a sample is out."""
    found: Outliers = {}
    for column, end in rules.columns:
        values = decisions[column].to_numpy().astype(np.float64)  # NaN where it has none
        ranks = -values if end == "highest" else values
        uids = index["uid"]
        rows = np.flatnonzero(np.isfinite(ranks))
        rows = rows[np.argsort(ranks[rows], kind="stable")]
        if len(rows) > NUM_OUTLIERS:  # and all that tie with the last
            rows = rows[ranks[rows] <= ranks[rows[NUM_OUTLIERS - 1]]]
        keyed = [(float(ranks[row]), uids[int(row)].as_py().hex(), int(row)) for row in rows]
        found[column] = [
            Outlier(
                rank,
                uid,
                {
                    **reference(shard, index, row),
                    "value": float(values[row]),
                    "outcome": outcomes[row],
                },
            )
            for rank, uid, row in heapq.nsmallest(NUM_OUTLIERS, keyed)
        ]
    return found


def merge_outliers(a: Outliers, b: Outliers) -> Outliers:
    """Return the first of both."""
    return {
        column: heapq.nsmallest(
            NUM_OUTLIERS, [*a.get(column, []), *b.get(column, [])], key=lambda o: o[:2]
        )
        for column in {**a, **b}
    }


def summarize_outliers(found: Outliers, rules: OutlierRules) -> dict[str, Any]:
    """Return the part of the report: `outliers`, by column: `end` and `samples`."""
    return {
        "outliers": {
            column: {"end": end, "samples": [o.reference for o in found.get(column, [])]}
            for column, end in rules.columns
        }
    }
