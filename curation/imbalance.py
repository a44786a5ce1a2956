"""How unevenly a pool shows its concepts: head, tail, and what balancing did to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
# Upper edges are open: a bin holds edge <= samples that have the entry < next edge.
EDGES = (1, *(m * 10**e for e in range(1, 10) for m in (1, 3)))


def gini(counts: IntArray) -> float:
    """Return the Gini coefficient of counts: 0 where all are equal, near 1 where one has all."""
    n, total = len(counts), counts.sum()
    if not n or not total:
        return 0.0
    ranks = np.arange(1, n + 1, dtype=np.float64)
    return float(2 * (ranks * np.sort(counts)).sum() / (n * float(total)) - (n + 1) / n)


def imbalance(counts: IntArray, is_head: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return measures of the counts of entries: how many samples have each.

    `is_head`: entries with a count above t before balancing. `head_share` and `tail_share` are
    shares of all matches, `top_percent_share` that of the 1 % most frequent of the entries given.
    """
    total = int(counts.sum())
    num_top = max(1, len(counts) // 100)
    ranked = np.sort(counts)[::-1]
    head = int(counts[is_head].sum())
    return {
        "num_matches": total,
        "head_share": head / total if total else 0.0,
        "tail_share": (total - head) / total if total else 0.0,
        "top_percent_share": int(ranked[:num_top].sum()) / total if total else 0.0,
        "gini": gini(counts),
    }


def head_tail_histogram(before: IntArray, after: IntArray) -> list[dict[str, int]]:
    """Return entries and matches by how many samples have the entry, before and after.

    A row for each bin up to the last that is not empty: `from` (its lower edge), and
    `entries_before`, `entries_after` (in the bin by their count then), `matches_before` and
    `matches_after` of the entries that were in the bin before.
    """
    edges = np.array(EDGES)
    bins = [np.searchsorted(edges, counts, side="right") - 1 for counts in (before, after)]
    rows = []
    for number, edge in enumerate(EDGES):
        inside = bins[0] == number
        rows.append(
            {
                "from": int(edge),
                "entries_before": int(inside.sum()),
                "entries_after": int((bins[1] == number).sum()),
                "matches_before": int(before[inside].sum()),
                "matches_after": int(after[inside].sum()),
            }
        )
    while rows and not rows[-1]["entries_before"] and not rows[-1]["entries_after"]:
        rows.pop()
    return rows
