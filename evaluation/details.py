"""Curves and matrices for the report, beside the results: `details.json` (docs/formats.md).

One object for each (checkpoint, dataset, method, shots): what the method showed (a confusion
matrix, ROC curves, risk over coverage, groups).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.publish import publish_text
from evaluation.methods.registry import Outcome

DETAILS_FILE = "details.json"
Json = dict[str, Any]


def details_of(checkpoint: str, dataset: str, outcome: Outcome) -> list[Json]:
    """Return what an outcome shows, none or one object."""
    if not outcome.shown:
        return []
    identity = {"checkpoint": checkpoint, "dataset": dataset, "method": outcome.method}
    return [{**identity, "shots": outcome.shots, **outcome.shown}]


def read_details(folder: Path) -> list[Json]:
    """Return the details that stand in a folder; none where nothing was published yet."""
    path = folder / DETAILS_FILE
    if not path.exists():
        return []
    try:
        details: list[Json] = json.loads(path.read_text(encoding="utf-8"))
        sorted(details, key=_order)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not a list of details ({error!r}). Move the file away, or choose another "
            "`output`."
        ) from None
    return details


def publish_details(folder: Path, new: Sequence[Json]) -> None:
    """Merge details into the folder's file, within `result.locked`."""
    if not new:
        return
    replaced = {_order(detail) for detail in new}
    kept = [detail for detail in read_details(folder) if _order(detail) not in replaced]
    merged = sorted([*kept, *new], key=_order)
    publish_text(folder / DETAILS_FILE, json.dumps(merged, ensure_ascii=False) + "\n")


def _order(detail: Json) -> tuple[str, str, str, int]:
    return detail["dataset"], detail["method"], detail["checkpoint"], detail.get("shots") or 0
