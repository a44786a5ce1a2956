"""The contract of a filter, and the registry of them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.registry import Registry


class Judgement(NamedTuple):
    """What a filter says of a table of samples: one entry a sample, in its order.

    `values` are the columns that it judged by; they go into the decision table as `FILTER.VALUE`.
    `reasons` (string) is null for keep, else why the sample is dropped: a short constant phrase,
    since drops are counted by it.
    """

    values: dict[str, pa.Array]
    reasons: pa.Array


# Rows of an index (docs/formats.md) in, those of them that no rule before has dropped.
Filter = Callable[[pa.Table], Judgement]

filters = Registry[Filter]("filter")


def first_reason(num_samples: int, tests: Sequence[tuple[str, npt.NDArray[np.bool_]]]) -> pa.Array:
    """Return for each sample the reason of the first test that it fails; `tests` say who fails."""
    reasons = np.full(num_samples, None, dtype=object)
    for reason, fails in reversed(tests):
        reasons[fails] = reason
    return pa.array(reasons, pa.string())
