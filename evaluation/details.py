"""Curves and matrices for the report, beside the results: `details.json` (docs/formats.md).

One object for each (checkpoint, dataset, method, shots): what the method showed (a confusion
matrix, ROC curves, risk over coverage, groups).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.json_list import Json, JsonList
from evaluation.methods.registry import Outcome

DETAILS_FILE = "details.json"


def details_of(checkpoint: str, dataset: str, outcome: Outcome) -> list[Json]:
    """Return what an outcome shows, none or one object."""
    if not outcome.shown:
        return []
    identity = {"checkpoint": checkpoint, "dataset": dataset, "method": outcome.method}
    return [{**identity, "shots": outcome.shots, **outcome.shown}]


def read_details(folder: Path) -> list[Json]:
    """Return the details that stand in a folder; none where nothing was published yet."""
    return _FILE.read(folder)


def publish_details(folder: Path, new: Sequence[Json]) -> None:
    """Merge details into the folder's file, within `result.locked`."""
    if new:
        _FILE.publish(folder, new)


def _order(detail: Json) -> tuple[str, str, str, int]:
    return detail["dataset"], detail["method"], detail["checkpoint"], detail.get("shots") or 0


_FILE = JsonList(DETAILS_FILE, "details", _order)
