"""What could not be trained on: counted over ranks and restarts, named in bad_samples-RANK.jsonl.

One line a replaced sample: its position in the order of training, its shard and key, and why.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from configs.errors import DataError
from configs.publish import publish_text
from pretrain.data.loader import BadSample

_PATTERN = "bad_samples-*.jsonl"
_FIRST_CHECK = 1_000  # samples seen before the share of bad ones means something


class BadSamples:
    """The bad samples of one rank since the run was opened, and those of all ranks before that."""

    def __init__(self, folder: Path, *, rank: int, num_before: int) -> None:
        self._path = folder / _PATTERN.replace("*", str(rank))
        self.num_before = num_before
        self.num_here = 0

    def note(self, bad: Sequence[BadSample]) -> None:
        """Count and name the replaced samples of a batch."""
        if bad:
            self.num_here += len(bad)
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample._asdict()) + "\n" for sample in bad)


def drop_rows_after(folder: Path, samples_seen: int) -> None:
    """Remove the rows of positions that a resumed run will come to again."""
    for path in folder.glob(_PATTERN):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _position(line) < samples_seen]
        publish_text(path, "".join(f"{line}\n" for line in kept))


def _position(line: str) -> float:
    try:
        return float(json.loads(line)["position"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut by a kill


def check_share(num_bad: int, *, samples_seen: int, limit: float, folder: str) -> None:
    """Raise DataError where more than the share `limit` of the samples seen were bad."""
    if samples_seen >= _FIRST_CHECK and num_bad > limit * samples_seen:
        raise DataError(
            f"{num_bad:,} of {samples_seen:,} samples could not be used, more than "
            f"data.max_bad_fraction = {limit:g}. They are named in {folder}/{_PATTERN}. "
            "Curate the dataset, or raise the limit."
        )
