"""How the values of a score lie, in little: counts by bins that the bits of a float32 make.

Counts of shards add up in any order, and no range has to be known before. A bin is at most 0.8 %
wide, whatever the size of the values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_BIN_BITS = 16  # sign, exponent and 7 bits more

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ValueCounts:
    """A column of one shard or of many: nulls, and counts of values by bin (see `bin_of`)."""

    num_null: int = 0
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, other: ValueCounts) -> ValueCounts:
        """Return both together."""
        return ValueCounts(self.num_null + other.num_null, self.counts + other.counts)

    def quantile(self, share: float) -> float | None:
        """Return the lower edge of the bin below which `share` of the values lie, about."""
        total, seen = self.counts.total(), 0
        for number in sorted(self.counts):
            seen += self.counts[number]
            if seen > share * total or seen == total:
                return value_of_bin(number)
        return None


def bin_of(values: FloatArray) -> npt.NDArray[np.int64]:
    """Return the bins of finite values, in the order of the values: bits of the float32."""
    bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> np.uint32(32 - _BIN_BITS)).astype(np.int64)


def value_of_bin(number: int) -> float:
    """Return the lower edge of a bin."""
    ordered = np.uint32(number << (32 - _BIN_BITS))
    bits = ordered & np.uint32(0x7FFFFFFF) if ordered >> 31 else ~ordered
    return float(np.array(bits, np.uint32).view(np.float32))


def count_values(column: pa.ChunkedArray | pa.Array) -> ValueCounts:
    """Return the counts of one column of an index."""
    values = column.drop_null().to_numpy()
    numbers, counts = np.unique(bin_of(values), return_counts=True)
    pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
    return ValueCounts(column.null_count, Counter(dict(pairs)))
