"""Find the samples whose key came before in the output: they are written under another key.

A pass over all keys in bounded memory: they are compared by 64-bit hash, bucket by bucket. (Two
different keys of one hash, one chance in 30 at a billion samples, cost one needless new name.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.publish import published_file
from curation.order import KEY_RECORD

SAMPLES_PER_BUCKET = 4_000_000


def num_buckets(num_samples: int) -> int:
    """Return how many buckets keep one of them small."""
    return max(1, -(-num_samples // SAMPLES_PER_BUCKET))


@dataclass(frozen=True, kw_only=True)
class RenameTask:
    """Look through one bucket: of each block's key file, the records [first, last)."""

    path: Path
    parts: tuple[tuple[Path, int, int], ...]

    def __str__(self) -> str:
        return self.path.name


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """How many keys of a bucket were looked at, and how many of them came before."""

    num_samples: int
    num_renamed: int


def find_renames(task: RenameTask) -> Renamed:
    """Publish the output positions, ascending, of all samples of a bucket whose key came before."""
    records = np.concatenate(
        [
            np.fromfile(path, KEY_RECORD, last - first, offset=first * KEY_RECORD.itemsize)
            for path, first, last in task.parts
        ]
    )
    positions = positions_of_repeats(records)
    with published_file(task.path) as file:
        np.save(file, positions)
    return Renamed(num_samples=len(records), num_renamed=len(positions))


def positions_of_repeats(records: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Return the positions, ascending, of all records but the first of each hash."""
    records = records[np.lexsort((records["position"], records["hash"]))]
    is_repeat = np.zeros(len(records), dtype=bool)
    is_repeat[1:] = records["hash"][1:] == records["hash"][:-1]
    positions: npt.NDArray[np.uint64] = np.sort(records["position"][is_repeat])
    return positions
