"""Which records are dropped: pure functions of records that share a bucket.

Records of one bucket may be linked: those of an exact kind all are, those of a near kind where they
are near enough. A record is dropped iff a record that it is linked to ranks better; who is dropped
for whom is one hop, with no closure over chains, so that it depends on no order.

`rank` is the position of each record when all are sorted by the keep policy, best first; no two
records share one. `better` is, for each record, the position of the best-ranked record that it is
linked to if that ranks better than itself, else -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
# (items a [m], items b [k]) -> [m, k]: which are near.
Near = Callable[[IntArray, IntArray], BoolArray]
_ROWS_AT_ONCE = 512


class Linked(NamedTuple):
    """What the buckets say of their records."""

    better: IntArray
    cut: IntArray  # number of different items of each bucket that was cut


def link_equal(bucket: IntArray, rank: IntArray) -> IntArray:
    """Return `better` where all records of a bucket are linked: the best of the bucket."""
    order, starts = _groups(bucket, rank)
    best = np.repeat(order[starts], np.diff(starts, append=len(order)))
    better = np.empty(len(bucket), np.int64)
    better[order] = np.where(best == order, -1, best)
    return better


def link_near(
    bucket: IntArray, rank: IntArray, item: IntArray, near: Near, *, max_band: int
) -> Linked:
    """Return `better` where records of a bucket are linked iff their items are near.

    `item` numbers what is compared: records with equal items are linked, and only the best of them
    is compared with others, which gives the same. In a bucket with more than `max_band` different
    items each is compared with the max_band best-ranked only: such a bucket is cut.
    """
    of_equal = link_equal(number_pairs(bucket, item), rank)
    heads = np.flatnonzero(of_equal < 0)  # the best of each (bucket, item)
    of_head = np.full(len(bucket), -1, np.int64)
    cut = []
    order, starts = _groups(bucket[heads], rank[heads])
    ends = np.append(starts, len(order))[1:]
    for start, end in zip(starts, ends, strict=True):
        members = heads[order[start:end]]
        if len(members) > max_band:
            cut.append(len(members))
        if len(members) > 1:
            of_head[members] = _first_near(members, item, near, max_band)
    # A record follows the best of its equals, and whatever is near that one and better still.
    head = np.where(of_equal < 0, np.arange(len(bucket)), of_equal)
    better = np.where(of_head[head] >= 0, of_head[head], of_equal)
    return Linked(better, np.array(cut, np.int64))


def _first_near(members: IntArray, item: IntArray, near: Near, max_band: int) -> IntArray:
    """Return for each member, best first, the first before it that is near; -1 for none."""
    found = np.full(len(members), -1, np.int64)
    candidates = members[:max_band]
    for start in range(0, len(members), _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(members)))
        columns = candidates[: rows[-1]]
        if not len(columns):
            continue
        is_near = near(item[members[rows]], item[columns])
        is_near &= np.arange(len(columns))[None, :] < rows[:, None]
        first = is_near.argmax(axis=1)
        found[rows] = np.where(is_near.any(axis=1), columns[first], -1)
    return found


def number_pairs(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> IntArray:
    """Return a number for each pair (a, b): the same for the same pair."""
    order = np.lexsort((b, a))
    is_new = (a[order][1:] != a[order][:-1]) | (b[order][1:] != b[order][:-1])
    numbers = np.zeros(len(order), np.int64)
    numbers[order[1:]] = np.cumsum(is_new)
    return numbers


def _groups(bucket: IntArray, rank: IntArray) -> tuple[IntArray, IntArray]:
    """Return the order of records by (bucket, rank), and where each bucket starts in it."""
    order = np.lexsort((rank, bucket)).astype(np.int64)
    ordered = bucket[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(order)])
    return order, starts.astype(np.int64)
