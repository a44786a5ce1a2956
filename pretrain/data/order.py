"""The order of samples: a pure function of (seed, manifest digest, epoch), the same for every world
size.

An epoch permutes the shards, cuts them into windows of `window_shards`, and permutes the samples
within each window. Position p is sample p mod N of epoch p div N. The c-th sample that a run
consumes stands at position c, or further on by the ranges that it skips (`positions_of`): global
batch k is the slice [k B, (k+1) B) of samples consumed, rank r of W takes the r-th part of it. So
the state is one number and the skipped ranges, an epoch may end inside a batch, and any position is
reached at once: the permutation of one window is all that is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs import draws

Int64Array = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where samples are: shard numbers in the manifest and rows in their indexes."""

    shard: Int64Array
    row: Int64Array


class Window(NamedTuple):
    """A run of positions that reads from a few shards only."""

    first: int  # position
    size: int  # samples
    shards: Int64Array  # shard numbers in the manifest


def positions_of(consumed: Int64Array, skipped: Sequence[tuple[int, int]] = ()) -> Int64Array:
    """Return the positions of the samples that a run consumes as its number `consumed` [b].

    `skipped` are half-open ranges [first, last) of positions that are never visited; they may be
    empty, overlap and come in any order.
    """
    merged: list[list[int]] = []
    for first, last in sorted(r for r in skipped if r[0] < r[1]):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    ranges = np.asarray(merged, dtype=np.int64).reshape(-1, 2)
    lengths = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])])
    starts = ranges[:, 0] - lengths[:-1]  # in samples consumed
    moved: Int64Array = consumed + lengths[np.searchsorted(starts, consumed, side="right")]
    return moved


class SampleOrder:
    """Maps positions to samples of a dataset of `shard_sizes` samples a shard."""

    def __init__(
        self, shard_sizes: npt.ArrayLike, *, seed: int, digest: str, window_shards: int
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        assert self.num_samples > 0, "an empty dataset has no order"
        self._seed = seed
        self._digest = digest
        self._window_shards = window_shards
        self._epoch_plan = lru_cache(maxsize=2)(self._plan_epoch)
        self._window_order = lru_cache(maxsize=2)(self._permute_window)

    def locate(self, positions: Int64Array) -> Place:
        """Return shard and row of each position (any order, any epoch)."""
        shard = np.empty_like(positions)
        row = np.empty_like(positions)
        epochs, offsets = np.divmod(positions, self.num_samples)
        for epoch in np.unique(epochs):
            shards, window_starts = self._epoch_plan(int(epoch))
            windows = np.searchsorted(window_starts, offsets, side="right") - 1
            for window in np.unique(windows[epochs == epoch]):
                chosen = (epochs == epoch) & (windows == window)
                order, starts = self._window_order(int(epoch), int(window))
                inside = order[offsets[chosen] - window_starts[window]]
                which = np.searchsorted(starts, inside, side="right") - 1
                first = int(window) * self._window_shards
                shard[chosen] = shards[first + which]
                row[chosen] = inside - starts[which]
        return Place(shard, row)

    def at(self, position: int) -> tuple[int, int]:
        """Return shard and row of one position."""
        place = self.locate(np.asarray([position], dtype=np.int64))
        return int(place.shard[0]), int(place.row[0])

    def window(self, position: int) -> Window:
        """Return the window that a position lies in."""
        epoch, offset = divmod(position, self.num_samples)
        shards, starts = self._epoch_plan(epoch)
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        end = int(starts[number + 1]) if number + 1 < len(starts) else self.num_samples
        first = number * self._window_shards
        return Window(
            first=epoch * self.num_samples + int(starts[number]),
            size=end - int(starts[number]),
            shards=shards[first : first + self._window_shards],
        )

    def _purpose(self, what: str) -> str:
        return f"order/{what}/{self._digest}"

    def _plan_epoch(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Return the epoch's shards in order and the offset at which each window starts."""
        num_shards = len(self.shard_sizes)
        shards = draws.permutation(num_shards, self._seed, self._purpose("shards"), epoch)
        starts = np.concatenate([[0], np.cumsum(self.shard_sizes[shards])])
        window_starts = starts[:-1][:: self._window_shards]
        # A window of empty shards starts where the next one does; searchsorted then skips it.
        return shards, window_starts

    def _permute_window(self, epoch: int, window: int) -> tuple[Int64Array, Int64Array]:
        """Return the window's permutation and the offset at which each of its shards starts."""
        shards, _ = self._epoch_plan(epoch)
        first = window * self._window_shards
        sizes = self.shard_sizes[shards[first : first + self._window_shards]]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        order = draws.permutation(
            int(starts[-1]), self._seed, self._purpose("samples"), epoch, window
        )
        return order, starts[:-1]
