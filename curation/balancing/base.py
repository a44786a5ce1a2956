"""What balancers share, and the registry of them all.

A balancer is a global rule (curation/global_rules/base.py): it names the entries that each sample
counts towards, counts them over the pool, and follows a keep probability from those counts:

    p_e = t_g / max(count_e, t_g)            of an entry e of the group (language) g
    keep = 1 - prod_{e in caption} (1 - p_e)   of a caption

The draw is a hash of (seed, uid), so that the result is the same on any machine. `t` is given, or
solved for the size wanted (target.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs import draws
from configs.publish import published_file
from configs.registry import Registry
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution

NO_ENTRY = "no entry matched"
BALANCED = "balanced away"
ENTRIES = "entries"
COUNTS = "counts.npy"
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def entry_probability(counts: npt.ArrayLike, t: npt.ArrayLike) -> FloatArray:
    """Return p_e = t / max(count, t) of each entry, in (0, 1]. `t` > 0 broadcasts."""
    threshold = np.asarray(t, dtype=np.float64)
    probability: FloatArray = threshold / np.maximum(np.asarray(counts, np.float64), threshold)
    return probability


def keep_probability(matched: pa.Array, probability: FloatArray) -> FloatArray:
    """Return 1 - prod(1 - p_e) over each sample's entries; 0 where there are none.

    `matched` is a list of entry ids a sample, `probability` p_e of every entry.
    """
    ids = matched.flatten().to_numpy(zero_copy_only=False)
    return _joined(1.0 - probability[ids], matched)


def _joined(misses: FloatArray, matched: pa.Array) -> FloatArray:
    lengths = matched.value_lengths().to_numpy(zero_copy_only=False)
    keep = np.zeros(len(lengths))
    some = lengths > 0
    if some.any():
        starts = (np.cumsum(lengths) - lengths)[some]
        keep[some] = 1.0 - np.multiply.reduceat(misses, starts)
    return keep


class Matched:
    """The entries of some samples: what their keep probability at any thresholds needs.

    `starts` are the ids at which each group's entries begin, `counts` those of the whole pool.
    """

    def __init__(self, entries: pa.Array, counts: IntArray, starts: IntArray) -> None:
        self._entries = entries
        ids = entries.flatten().to_numpy(zero_copy_only=False)
        self._counts = counts[ids].astype(np.float64)
        self._groups = np.searchsorted(starts, ids, side="right") - 1

    def keep_probability(self, thresholds: FloatArray) -> FloatArray:
        """Return each sample's probability where group g has the threshold thresholds[g]."""
        probability = entry_probability(self._counts, thresholds[self._groups])
        return _joined(1.0 - probability, self._entries)


def sparse_counts(matched: pa.ChunkedArray | pa.Array) -> tuple[IntArray, IntArray]:
    """Return the ids in a column of id lists, ascending, and how often each is there."""
    if isinstance(matched, pa.ChunkedArray):
        matched = matched.combine_chunks()
    ids = matched.drop_null().flatten().to_numpy(zero_copy_only=False)
    entries, counts = np.unique(ids, return_counts=True)
    return entries.astype(np.int64), counts.astype(np.int64)


def _count(part: ShardPart, argument: None) -> tuple[IntArray, IntArray]:
    return sparse_counts(part.emitted(ENTRIES)[ENTRIES])


# Once a worker: the folder's name is the digest of all that made the counts.
@lru_cache(maxsize=1)
def read_counts(folder: Path) -> IntArray:
    """Return the pool's counts of a solution, mapped into memory."""
    counts: IntArray = np.load(folder / COUNTS, mmap_mode="r", allow_pickle=False)
    return counts


def draw(part: ShardPart, uids: pa.ChunkedArray) -> FloatArray:
    """Return the draw from [0, 1) of each sample; it is kept iff it is below its probability."""
    if not len(uids):
        return np.zeros(0)
    return draws.uniform(part.seed, f"{part.label}/draw", *draws.uid_words(uids.to_pylist()))


class Balancer(ABC):
    """Counts entries over a pool and balances samples by them.

    Exactly one of `t` and `target_size` is given.
    """

    def __init__(self, t: float | None, target_size: int | None) -> None:
        self._t, self._target_size = t, target_size

    @property
    @abstractmethod
    def emit_digest(self) -> str:
        """See GlobalRule."""

    @property
    def solve_digest(self) -> str:
        """See GlobalRule."""
        return f"{self._t} {self._target_size}"

    @property
    @abstractmethod
    def starts(self) -> IntArray:
        """Ids at which each group's entries begin, and behind them the number of all entries."""

    @abstractmethod
    def match(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return at least `entries`: ids of each sample's, list<int32>, ascending, each once."""

    @abstractmethod
    def scale(self, counts: IntArray) -> Callable[[float], FloatArray]:
        """Return a function from t to the threshold of each group, which never falls with t."""

    @abstractmethod
    def entry_table(self) -> pa.Table:
        """Return what is counted: a column `entry`, in the order of ids, and more that names it."""

    @abstractmethod
    def describe(self) -> str:
        """Return in a few words what is counted, for a dry run."""

    def head(self, counts: IntArray, solution: Solution) -> npt.NDArray[np.bool_]:
        """Return which entries are above their threshold."""
        lengths = np.diff(self.starts)
        is_head: npt.NDArray[np.bool_] = counts > np.repeat(
            np.array(solution.values["thresholds"]), lengths
        )
        return is_head

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """See GlobalRule."""
        return self.match(samples)

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Count the entries of the pool, then find t."""
        from curation.balancing.target import solve_target

        counts = np.zeros(self.starts[-1], np.int64)
        for _, (ids, more) in pool.map(_count, None, step="count"):
            counts[ids] += more
        with published_file(pool.folder / COUNTS) as file:
            np.save(file, counts)
        scale = self.scale(counts)
        if self._target_size is None:
            assert self._t is not None
            return {"t": self._t, "thresholds": scale(self._t).tolist()}
        solved = solve_target(pool, self.starts[:-1], counts, scale, self._target_size)
        return {**solved, "thresholds": scale(solved["t"]).tolist()}

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Draw."""
        table = part.emitted(ENTRIES)
        entries = table[ENTRIES].combine_chunks()
        matched = Matched(entries, read_counts(solution.folder), self.starts[:-1])
        keep = matched.keep_probability(np.array(solution.values["thresholds"]))
        drawn = draw(part, table["uid"])
        is_dropped = drawn >= keep
        has_entry = entries.value_lengths().to_numpy(zero_copy_only=False) > 0
        tests = [
            *self.reasons_without_entry(part),
            (NO_ENTRY, is_dropped & ~has_entry),
            (BALANCED, is_dropped),
        ]
        values = {"keep_probability": pa.array(keep), "draw": pa.array(drawn)}
        return Judgement(values, first_reason(len(keep), tests))

    def reasons_without_entry(self, part: ShardPart) -> list[tuple[str, npt.NDArray[np.bool_]]]:
        """Return more exact reasons than "no entry matched", and for which samples."""
        return []


balancers = Registry[GlobalRule]("balancer")
