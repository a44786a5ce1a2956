"""The contract of a filter, and the registry of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.registry import Registry
from curation.columns import JSON_PREFIX, type_of
from curation.index import SCHEMA


class Judgement(NamedTuple):
    """What a filter says of a table of samples: one entry a sample, in its order.

    `values` are the columns that it judged by; they go into the decision table as `FILTER.VALUE`.
    `reasons` (string) is null for keep, else why the sample is dropped: a short constant phrase,
    since drops are counted by it.
    """

    values: dict[str, pa.Array]
    reasons: pa.Array


# Rows of an index (docs/formats.md) in, those of them that no rule before has dropped.
Filter = Callable[[pa.Table], Judgement]


@dataclass(frozen=True)
class _Needing:
    """A filter with what it needs besides the rows of every index."""

    judge: Filter
    needs: frozenset[str]
    scored: frozenset[str]
    digest: str

    def __call__(self, samples: pa.Table) -> Judgement:
        return self.judge(samples)


def needing(
    columns: Iterable[str], judge: Filter, *, scored: Iterable[str] = (), digest: str = ""
) -> Filter:
    """Return the filter with what it needs: `columns` that the scan must compute (columns.py),
    columns that `pairmill score` must have made (`scored`), and the `digest` of the files that it
    judges by.

    Raises:
        UsageError: no scan makes such a column.
    """
    columns = frozenset(columns)
    for name in columns:
        type_of(name)
    return _Needing(judge, columns, frozenset(scored), digest)


class Needs(NamedTuple):
    """The columns that some rules need besides those of every index, sorted."""

    columns: tuple[str, ...]  # the scan computes them
    scored: tuple[str, ...]  # `pairmill score` has made them, or there are none


def needs_of(rules: Iterable[object]) -> Needs:
    """Return what some rules need: of each the attributes `needs` and `scored`, if it has them."""
    rules = list(rules)
    names = ({n for rule in rules for n in getattr(rule, a, ())} for a in ("needs", "scored"))
    return Needs(*(tuple(sorted(found)) for found in names))


def needs_for(column: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return (`needs`, `scored`) of a rule that judges by the numbers of a column.

    `json.KEY` the scan computes; a name with a dot is a value of a rule before; any other that is
    not in every index must be a score.
    """
    one, none = frozenset({column}), frozenset[str]()
    if column.startswith(JSON_PREFIX):
        return one, none
    return none, none if "." in column or column in SCHEMA.names else one


filters = Registry[Filter]("filter")


def first_reason(num_samples: int, tests: Sequence[tuple[str, npt.NDArray[np.bool_]]]) -> pa.Array:
    """Return for each sample the reason of the first test that it fails; `tests` say who fails."""
    reasons = np.full(num_samples, None, dtype=object)
    for reason, fails in reversed(tests):
        reasons[fails] = reason
    return pa.array(reasons, pa.string())
