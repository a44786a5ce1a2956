"""The contract of a balancer, and the registry of them all.

Two steps with one barrier: `match` names what each sample counts towards (per shard), the pool's counts
are the sum of those over all shards, and `keep_probability` follows from them. The draw, and the
decision, are decide.py's.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.registry import Registry


class Balancer(Protocol):
    """Counts entries over a pool and balances samples by them."""

    entries: list[str]  # what is counted; an entry's id is its position

    def match(self, samples: pa.Table) -> pa.Array:
        """Return for each sample the ids of its entries: list<int32>, ascending, without repeats."""
        ...

    def keep_probability(
        self, matched: pa.Array, counts: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return each sample's probability from its entries and the pool's count of every entry."""
        ...


balancers = Registry[Balancer]("balancer")


def count_entries(matched: pa.Array, num_entries: int) -> npt.NDArray[np.int64]:
    """Return how many samples have each entry: associative, so shards may be summed in any order."""
    ids = matched.flatten().to_numpy(zero_copy_only=False)
    return np.bincount(ids, minlength=num_entries).astype(np.int64)
