"""One sample of an evaluation dataset, and the values that stand beside its image.

A value is `EXT` (a text member of a tar, or a table's column), `json:FIELD` (of the .json member;
dots go deeper) or `npy:INDEX` (of the .npy member; 2.0 counts as 2).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import DataError
from evaluation.dataset import Groups
from evaluation.tar import Span, TarSample


@dataclass(frozen=True)
class Record:
    """One image and the values beside it."""

    key: str
    image: Span
    sample: TarSample | None
    columns: Mapping[str, Any]

    def value(self, reference: str) -> Any:
        """Return a value, None where it is not there."""
        kind, _, field = reference.partition(":")
        if self.sample is None:
            return self.columns.get(reference)
        if kind == "json" and field:
            text = self.sample.text("json")
            return _deeper(self._parsed(text), field) if text is not None else None
        if kind == "npy" and field:
            span = self.sample.members.get("npy")
            if span is None:
                return None
            number = np.load(io.BytesIO(span.read()), allow_pickle=False).ravel()[int(field)].item()
            return int(number) if isinstance(number, float) and number.is_integer() else number
        text = self.sample.text(reference)
        return None if text is None else text.strip()

    def _parsed(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"{self.image.tar}: {self.key}.json is not JSON: {error}.") from None

    def texts(self, references: Sequence[str]) -> list[str]:
        """Return all texts of the references: lines of a text, members of a list."""
        found: list[str] = []
        for reference in references:
            value = self.value(reference)
            several = value if isinstance(value, list) else str(value or "").split("\n")
            found += [str(text).strip() for text in several if str(text).strip()]
        return list(dict.fromkeys(found))


def _deeper(value: Any, field: str) -> Any:
    for step in field.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def groups_of(records: Sequence[Record], reference: str) -> Groups:
    """Return the groups that a value makes of the samples, their names sorted."""
    values = [str(record.value(reference)) for record in records]
    names = sorted(set(values))
    place = {name: position for position, name in enumerate(names)}
    return Groups(tuple(names), np.asarray([place[v] for v in values], dtype=np.int64))
