"""What balancers share, and the registry of them all.

A balancer is a global rule (curation/global_rules/base.py): it names the entries that each sample
counts towards, counts them over the pool, and follows a keep probability from those counts. The
draw is a hash of (seed, uid), so that the result is the same on any machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class Balancer(ABC):
    """Counts entries over a pool and balances samples by them."""

    @property
    @abstractmethod
    def entries(self) -> list[str]:
        """What is counted; an entry's id is its position."""

    def entry_table(self) -> pa.Table:
        """Return the entries as a table with a column `entry`, in their order."""
        return pa.table({"entry": pa.array(self.entries, pa.string())})

    @property
    @abstractmethod
    def emit_digest(self) -> str:
        """See GlobalRule."""

    @property
    @abstractmethod
    def solve_digest(self) -> str:
        """See GlobalRule."""

    @abstractmethod
    def match(self, samples: pa.Table) -> pa.Array:
        """Return the ids of each sample's entries: list<int32>, ascending, each once."""

    @abstractmethod
    def keep_probability(self, matched: pa.Array, counts: IntArray, t: float) -> FloatArray:
        """Return each sample's probability from its entries and the pool's count of every entry."""

    @abstractmethod
    def threshold(self, pool: Pool, counts: IntArray) -> dict[str, Any]:
        """Return at least {"t": ...}: given, or solved for the size wanted."""

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """See GlobalRule."""
        return {ENTRIES: self.match(samples)}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Count the entries of the pool, then find t."""
        counts = np.zeros(len(self.entries), np.int64)
        for _, (ids, more) in pool.map(_count, None, step="count"):
            counts[ids] += more
        with published_file(pool.folder / COUNTS) as file:
            np.save(file, counts)
        return self.threshold(pool, counts)

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Draw."""
        table = part.emitted(ENTRIES)
        matched = table[ENTRIES].combine_chunks()
        counts = read_counts(solution.folder)
        keep = self.keep_probability(matched, counts, solution.values["t"])
        drawn = draw(part, table["uid"])
        has_entry = matched.value_lengths().to_numpy(zero_copy_only=False) > 0
        is_dropped = drawn >= keep
        tests = [(NO_ENTRY, is_dropped & ~has_entry), (BALANCED, is_dropped)]
        values = {"keep_probability": pa.array(keep), "draw": pa.array(drawn)}
        return Judgement(values, first_reason(len(keep), tests))


def draw(part: ShardPart, uids: pa.ChunkedArray) -> FloatArray:
    """Return the draw from [0, 1) of each sample; it is kept iff it is below its probability."""
    if not len(uids):
        return np.zeros(0)
    return draws.uniform(part.seed, f"{part.label}/draw", *draws.uid_words(uids.to_pylist()))


balancers = Registry[GlobalRule]("balancer")
