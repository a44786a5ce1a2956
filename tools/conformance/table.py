"""One row per compared quantity, and the table that `python -m tools.conformance` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table

Verdict = Literal["pass", "FAIL", "not built", "not comparable"]


@dataclass(frozen=True)
class Row:
    """One quantity of one golden case: how many numbers, the largest error, the verdict."""

    case: str
    quantity: str
    n: int
    error: float
    tolerance: float
    verdict: Verdict
    note: str = ""


def compare(
    case: str, quantity: str, ours: ArrayLike, expected: ArrayLike, *, atol: float, rtol: float = 0
) -> Row:
    """Compare numbers: the error is the largest |ours - expected| - rtol |expected|, to be <= atol.

    Equal infinities and NaN in the same places are equal; other shapes or a NaN of ours alone fail.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != b.shape:
        note = f"shape {a.shape}, expected {b.shape}"
        return Row(case, quantity, b.size, math.inf, atol, "FAIL", note)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b) - rtol * np.abs(b))
    error = float(np.max(difference, initial=0.0))
    error = math.inf if math.isnan(error) else max(error, 0.0)
    verdict: Verdict = "pass" if error <= atol else "FAIL"
    return Row(case, quantity, b.size, error, atol, verdict)


def equal(case: str, quantity: str, n: int, wrong: int, note: str = "") -> Row:
    """Compare things that are no numbers: `wrong` of `n` differ, and none may."""
    return Row(case, quantity, n, float(wrong), 0.0, "FAIL" if wrong else "pass", note)


def not_built(case: str, what: str) -> Row:
    """Return the row of a golden file whose method we do not have: listed, never passed."""
    return Row(case, what, 0, math.nan, math.nan, "not built")


def not_comparable(case: str, what: str) -> Row:
    """Return the row of a number of a method that we have, whose inputs are not all given."""
    return Row(case, what, 0, math.nan, math.nan, "not comparable")


def render(rows: Iterable[Row], console: Console) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("case", "quantity", "n", "max error", "allowed", "verdict"):
        numeric = heading in ("n", "max error", "allowed")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        is_compared = row.verdict in ("pass", "FAIL")
        numbers = (f"{row.n:,}", f"{row.error:.1e}", f"{row.tolerance:.0e}")
        numbers = numbers if is_compared else ("",) * 3
        verdict = f"{row.verdict} ({row.note})" if row.note else row.verdict
        table.add_row(row.case, row.quantity, *numbers, verdict)
    console.print(table, markup=False)
