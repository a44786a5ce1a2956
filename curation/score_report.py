"""The rules that judge by a number, for the report: how the values lie, and who is at both ends.

The values come from the decisions: a rule saw those of the samples that no rule before had dropped.
A shard hands over counts by bin and its own first and last samples, so that merging is exact and
its order does not matter; only the edges of the histogram are those of bins (value_counts.py).
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.repeats import KEPT, reference
from curation.value_counts import ValueCounts, count_values, value_of_bin

if TYPE_CHECKING:  # a worker does not need it, and it takes long to import
    from curation.config import CurateConfig

# Name of a rule -> its value in the decisions that it judges by.
VALUES = {
    "score": "value",
    "top_fraction": "score",
    "wfpp": "score",
    "poison": "score",
    "semdedup": "similarity",
    "clipcov": "score",
}
NUM_SHOWN = 12
NUM_BINS = 40
_TAIL = 0.001  # of the values, beyond the first and the last edge

Range = tuple[float, float]  # least and largest value


@dataclass(frozen=True)
class ScoreRules:
    """Labels of the rules whose values are looked at, with the columns that they judge by."""

    columns_by_label: tuple[tuple[str, str, str], ...]  # label, what it judges, decision column

    @classmethod
    def of(cls, config: CurateConfig) -> ScoreRules:
        """Return those of a job."""
        return cls(
            tuple(
                (label, getattr(rule, "column", rule.name), f"{label}.{VALUES[rule.name]}")
                for label, rule in zip(config.rule_labels(), config.rules, strict=True)
                if rule.name in VALUES
            )
        )

    @property
    def columns(self) -> list[str]:
        """Columns of the decision tables that are needed."""
        return [column for _, _, column in self.columns_by_label]


@dataclass
class RuleScores:
    """What one rule saw and left, of a shard or of many."""

    seen: ValueCounts = field(default_factory=ValueCounts)
    left: ValueCounts = field(default_factory=ValueCounts)
    left_range: Range | None = None
    dropped_range: Range | None = None
    # (value, or minus it, uid, reference): the first by both.
    lowest: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    highest: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)

    def merge(self, other: RuleScores) -> None:
        """Take in what another shard has."""
        self.seen, self.left = self.seen.add(other.seen), self.left.add(other.left)
        self.left_range = _both(self.left_range, other.left_range)
        self.dropped_range = _both(self.dropped_range, other.dropped_range)
        self.lowest = _first(self.lowest + other.lowest)
        self.highest = _first(self.highest + other.highest)


def _range(values: npt.NDArray[np.float64]) -> Range | None:
    return (float(values.min()), float(values.max())) if len(values) else None


def _both(one: Range | None, other: Range | None) -> Range | None:
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


def _first(found: list[tuple[float, str, dict[str, Any]]]) -> list[Any]:
    return heapq.nsmallest(NUM_SHOWN, found, key=lambda sample: sample[:2])


def shard_scores(
    shard: str, index: pa.Table, decisions: pa.Table, rules: ScoreRules
) -> dict[str, RuleScores]:
    """Return what one shard hands over by label; `index` has repeats.REFERENCE_COLUMNS."""
    found = {}
    reasons = np.array(decisions["reason"].to_pylist(), dtype=object)
    uids = decisions["uid"]
    for label, _, column in rules.columns_by_label:
        values = decisions[column].combine_chunks().cast(pa.float64())
        numbers = values.to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(np.isfinite(numbers))
        went = [reason is not None and reason.startswith(f"{label}/") for reason in reasons[rows]]
        is_gone = np.array(went, np.bool_)
        left = numbers[rows][~is_gone]
        own = RuleScores(
            seen=count_values(pa.array(numbers[rows])),
            left=count_values(pa.array(left)),
            left_range=_range(left),
            dropped_range=_range(numbers[rows][is_gone]),
        )
        for sign, ends in ((1, own.lowest), (-1, own.highest)):
            order = np.argsort(sign * numbers[rows], kind="stable")
            last = order[NUM_SHOWN - 1 : NUM_SHOWN]
            limit = sign * numbers[rows][last] if len(last) else np.inf
            for row in rows[sign * numbers[rows] <= limit].tolist():
                uid, value = uids[row].as_py().hex(), float(numbers[row])
                outcome = reasons[row] or KEPT
                ends.append((sign * value, uid, {"row": row, "value": value, "outcome": outcome}))
        for ends in (own.lowest, own.highest):
            ends[:] = _first(ends)
            for _, _, shown in ends:
                shown |= reference(shard, index, shown.pop("row"))
        found[label] = own
    return found


def summarize_scores(found: dict[str, RuleScores], rules: ScoreRules) -> dict[str, Any]:
    """Return `scores` of the report (docs/formats.md): label -> how its values lie."""
    content = {}
    for label, what, _ in rules.columns_by_label:
        own = found.get(label, RuleScores())
        content[label] = {
            "column": what,
            "num_scored": own.seen.counts.total(),
            "num_left": own.left.counts.total(),
            "left": own.left_range,
            "dropped": own.dropped_range,
            "histogram": _histogram(own),
            "lowest": [shown for _, _, shown in own.lowest],
            "highest": [shown for _, _, shown in own.highest],
        }
    return content


def _histogram(own: RuleScores) -> dict[str, list[Any]]:
    low, high = own.seen.quantile(_TAIL), own.seen.quantile(1 - _TAIL)
    if low is None or high is None:
        return {"edges": [], "before": [], "after": []}
    wide = np.linspace(low, high, NUM_BINS + 1)
    edges = sorted({float(f"{edge:.4g}") for edge in wide.tolist()})
    counted = [_binned(counts.counts, edges) for counts in (own.seen, own.left)]
    return {"edges": edges, "before": counted[0], "after": counted[1]}


def _binned(counts: Counter[int], edges: list[float]) -> list[int]:
    values = np.array([value_of_bin(number) for number in counts])
    bins = np.maximum(np.searchsorted(edges, values, side="right") - 1, 0)
    weights = np.array(list(counts.values()), np.int64)
    binned = np.zeros(len(edges), np.int64)
    np.add.at(binned, bins, weights)
    numbers: list[int] = binned.tolist()
    return numbers
