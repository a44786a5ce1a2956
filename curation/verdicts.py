"""The decision table of one shard while rules run over it (docs/formats.md, "Decisions")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.filters.base import Filter, Judgement

KEPT, DROPPED, UNREADABLE = "kept", "dropped", "unreadable"
_HEAD = ("uid", "key", "verdict", "reason")
# The balancer's own: they stand in every decision table, last and without the rule's name.
_DRAWN = ("keep_probability", "draw")


class Verdicts:
    """Who is left of the samples of one index, why the others are not, and by which values.

    `reason` is that of the first failing rule, or the problem of an unreadable sample. `partial` is
    what `table` returned after the rules before.
    """

    def __init__(self, samples: pa.Table, partial: pa.Table | None = None) -> None:
        self._samples = samples.combine_chunks()
        first = samples["problem"] if partial is None else partial["reason"]
        self._reasons = first.to_numpy(zero_copy_only=False).astype(object)
        self._values: dict[str, pa.Array] = {}
        if partial is not None:
            names = [name for name in partial.column_names if name not in _HEAD]
            self._values = {name: partial[name].combine_chunks() for name in names}

    @property
    def is_left(self) -> npt.NDArray[np.bool_]:
        """Mask of the samples that no rule has dropped so far."""
        return np.array([reason is None for reason in self._reasons], dtype=bool)

    def left(self) -> pa.Table:
        """Return the index rows of the samples left, with all values so far as `RULE.VALUE`."""
        table = self._samples
        for name, value in self._values.items():
            if name not in table.column_names:
                table = table.append_column(name, value)
        return table.filter(pa.array(self.is_left)).combine_chunks()

    def judge(self, label: str, judgement: Judgement) -> None:
        """Take in what the rule `label` says of the samples left."""
        is_left = self.is_left
        self._add(label, judgement.values, is_left)
        failed = judgement.reasons.to_pylist()
        self._reasons[is_left] = [reason and f"{label}/{reason}" for reason in failed]

    def add(self, label: str, values: Mapping[str, pa.Array]) -> None:
        """Take in values of the samples left; null for the others."""
        self._add(label, values, self.is_left)

    def _add(
        self, label: str, values: Mapping[str, pa.Array], is_left: npt.NDArray[np.bool_]
    ) -> None:
        rows = pa.array(np.cumsum(is_left) - 1, mask=~is_left)  # null where a sample is out already
        for name, value in values.items():
            assert len(value) == is_left.sum(), f"{label}.{name}: one value a sample"
            full = name if name in _DRAWN else f"{label}.{name}"
            self._values[full] = value.take(rows)

    def drop_scratch(self, label: str) -> None:
        """Forget the values of a rule whose names start with an underscore."""
        for name in [name for name in self._values if name.startswith(f"{label}._")]:
            del self._values[name]

    def table(self, *, is_final: bool = False) -> pa.Table:
        """Return the decision table as it stands."""
        is_readable = self._samples["problem"].is_null().to_numpy()
        verdicts = np.where(self.is_left, KEPT, DROPPED).astype(object)
        verdicts[~is_readable] = UNREADABLE
        columns: dict[str, Any] = {
            "uid": self._samples["uid"],
            "key": self._samples["key"],
            "verdict": pa.array(verdicts, pa.string()),
            "reason": pa.array(self._reasons, pa.string()),
        }
        drawn = {name: self._values[name] for name in _DRAWN if name in self._values}
        if is_final and not drawn:
            drawn = dict.fromkeys(_DRAWN, pa.nulls(len(verdicts), pa.float64()))
        others = {name: value for name, value in self._values.items() if name not in drawn}
        return pa.table({**columns, **others, **drawn})


def judge_samples(samples: pa.Table, rules: Sequence[tuple[str, Filter]]) -> pa.Table:
    """Return the decision table of some index rows after (label, filter) in order."""
    verdicts = Verdicts(samples)
    for label, rule in rules:
        verdicts.judge(label, rule(verdicts.left()))
    return verdicts.table()
