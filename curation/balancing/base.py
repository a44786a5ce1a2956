"""The contract of a balancer, and the registry of them all.

Two steps with one barrier: `match` names what each sample counts towards (per shard), the pool's
counts are the sum of those over all shards, and `keep_probability` follows from them. The draw,
and the decision, are decide.py's.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.registry import Registry


class Balancer(Protocol):
    """Counts entries over a pool and balances samples by them."""

    @property
    def entries(self) -> list[str]:
        """What is counted; an entry's id is its position."""
        ...

    @property
    def match_digest(self) -> str:
        """What the result of `match` depends on, in one line: matches are kept for the next run."""
        ...

    def match(self, samples: pa.Table) -> pa.Array:
        """Return the ids of each sample's entries: list<int32>, ascending, each once."""
        ...

    def keep_probability(
        self, matched: pa.Array, counts: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return each sample's probability from its entries and the pool's count of every entry."""
        ...


balancers = Registry[Balancer]("balancer")
