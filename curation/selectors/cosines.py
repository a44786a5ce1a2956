"""Cosines of float16 vectors, compared exactly, at the speed of float32 matrix products.

The products of two float16 numbers are multiples of 2^-48, so that a dot product of vectors of
about unit length is exact in float64 in any order of its terms; so is the square of a norm. A
comparison of cosines is therefore a fact of the two vectors, whatever the BLAS, its threads, the
block or the order of the rows: float32 decides what is further from the threshold than it can be
wrong, and float64 the few pairs that are nearer.

Shapes: n rows, m columns, D dimensions. A cosine is dot(a, b) / sqrt(dot(a, a) * dot(b, b)).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_ROWS_AT_ONCE = 1024
_PAIRS_AT_ONCE = 1 << 16
_ELEMENTS_AT_ONCE = 1 << 24


def margin(dim: int) -> float:
    """Return how wrong a float32 cosine can be: each of D + 8 roundings by 2^-24 of at most 1."""
    return (dim + 8) * 2.0**-24


def unit(vectors: npt.NDArray[Any]) -> Float32Array:
    """Return the rows divided by their norms, as float32 [n, D]; no row may be zero or NaN."""
    units = vectors.astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", units, units, dtype=np.float64))
    units /= norms[:, None].astype(np.float32)
    return units


def exact_cosines(a: npt.NDArray[np.float16], b: npt.NDArray[np.float16]) -> Float64Array:
    """Return the cosine of each row of `a` and the row of `b` at the same place: [n]."""
    found = np.empty(len(a))
    for start in range(0, len(a), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        one, two = a[some].astype(np.float64), b[some].astype(np.float64)
        squares = np.einsum("ij,ij->i", one, one) * np.einsum("ij,ij->i", two, two)
        found[some] = np.einsum("ij,ij->i", one, two) / np.sqrt(squares)
    return found


def nearest(
    vectors: npt.NDArray[np.float16], centroids: npt.NDArray[np.float16]
) -> tuple[IntArray, Float64Array]:
    """Return for each row the centroid of the largest cosine, the first of equals, and the cosine.

    Shapes: [n, D] and [m, D] in; [n] and [n] out. No row may be zero or NaN.
    """
    found = np.empty(len(vectors), np.int64)
    targets = unit(centroids).T
    close = 2 * margin(vectors.shape[1])
    step = max(1, _ELEMENTS_AT_ONCE // len(centroids))
    for start in range(0, len(vectors), step):
        rows = vectors[start : start + step]
        cosines = unit(rows) @ targets
        best = cosines.argmax(axis=1)
        top = cosines[np.arange(len(rows)), best]
        is_close = cosines >= (top - np.float32(close))[:, None]
        unclear = np.flatnonzero(is_close.sum(axis=1) > 1)
        if len(unclear):
            of, candidates = np.nonzero(is_close[unclear])
            exact = exact_cosines(rows[unclear[of]], centroids[candidates])
            order = np.lexsort((candidates, -exact, of))
            first = order[np.unique(of[order], return_index=True)[1]]
            best[unclear] = candidates[first]
        found[start : start + step] = best
    return found, exact_cosines(vectors, centroids[found])


@dataclass(frozen=True)
class Block:
    """Some rows of a ranked group, and their float32 cosines with rows that rank better."""

    rows: IntArray
    columns: IntArray  # the rows that they are compared with
    cosines: Float32Array  # [rows, columns]
    is_better: npt.NDArray[np.bool_]  # the column ranks better than the row


class Ranked:
    """The vectors of one group, best first: each is compared with those before it.

    With `each_once` only the first of equal vectors is compared with the others: the nearest
    better one and the first better one above a threshold are the same. With more than
    `max_compared` to compare with, each is compared with the max_compared best.
    """

    def __init__(
        self, vectors: npt.NDArray[np.float16], *, max_compared: int, each_once: bool = False
    ) -> None:
        self._vectors, self._unit = vectors, unit(vectors)
        columns = _first_of_equal(vectors) if each_once else np.arange(len(vectors))
        self.is_cut = len(columns) > max_compared
        self._columns = columns[:max_compared]
        whole = len(self._columns) == len(vectors)
        self._column_units = self._unit if whole else self._unit[self._columns]
        self.margin = margin(vectors.shape[1])

    def blocks(self) -> Iterator[Block]:
        """Yield all rows but the first, block by block."""
        step = max(1, min(_ROWS_AT_ONCE, _ELEMENTS_AT_ONCE // max(1, len(self._columns))))
        for start in range(1, len(self._vectors), step):
            rows = np.arange(start, min(start + step, len(self._vectors)))
            num = int(np.searchsorted(self._columns, rows[-1]))
            columns = self._columns[:num]
            cosines = self._unit[rows] @ self._column_units[:num].T
            yield Block(rows, columns, cosines, columns[None, :] < rows[:, None])

    def above(self, block: Block, threshold: float) -> npt.NDArray[np.bool_]:
        """Return which cosines of better rows are above a threshold, exactly: [rows, columns]."""
        is_above: npt.NDArray[np.bool_] = block.cosines > np.float32(threshold + self.margin)
        is_above &= block.is_better
        unclear = np.abs(block.cosines - np.float32(threshold)) <= np.float32(2 * self.margin)
        row, column = np.nonzero(unclear & block.is_better)
        is_above[row, column] = self._exact(block, row, column) > threshold
        return is_above

    def largest(self, block: Block) -> Float64Array:
        """Return the largest cosine of each row with a better one, exactly: [rows]."""
        cosines = np.where(block.is_better, block.cosines, np.float32(-2))
        top = cosines.max(axis=1)
        row, column = np.nonzero(cosines >= (top - np.float32(2 * self.margin))[:, None])
        largest = np.full(len(block.rows), -2.0)
        np.maximum.at(largest, row, self._exact(block, row, column))
        return largest

    def _exact(self, block: Block, row: IntArray, column: IntArray) -> Float64Array:
        found = np.empty(len(row))
        for start in range(0, len(row), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            a, b = block.rows[row[some]], block.columns[column[some]]
            found[some] = exact_cosines(self._vectors[a], self._vectors[b])
        return found


def _first_of_equal(vectors: npt.NDArray[np.float16]) -> IntArray:
    """Return the rows that equal none before them."""
    data = np.ascontiguousarray(vectors)
    raw = data.view(np.dtype((np.void, data.shape[1] * data.itemsize)))[:, 0]
    _, first = np.unique(raw, return_index=True)
    return np.sort(first).astype(np.int64)
