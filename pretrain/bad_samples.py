"""What could not be trained on: counted by kind over ranks and restarts, named in
bad_samples-RANK.jsonl.

One line a replaced sample: its position in the order of training, its source, its shard and key,
the kind of problem, and the problem in full.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import DataError
from configs.publish import publish_text
from pretrain.data.batch import BadSample

# The problems of an index (docs/formats.md), then those that only reading finds.
KINDS = (
    "no image", "no caption", "caption not utf-8", "caption too long", "bad json", "empty image",
    "bad image header", "too many pixels", "truncated", "undecodable image", "too many bytes",
    "no negative caption", "other",
)  # fmt: skip
_PATTERN = "bad_samples-*.jsonl"
_FIRST_CHECK = 1_000  # samples seen before the share of bad ones means something


class BadSamples:
    """The bad samples of one rank since the run was opened, and those of all ranks before that."""

    def __init__(self, folder: Path, *, rank: int, before: Mapping[str, int]) -> None:
        self._path = folder / _PATTERN.replace("*", str(rank))
        self._before = before
        self._here: Counter[str] = Counter()

    def note(self, bad: Sequence[BadSample]) -> None:
        """Count and name the replaced samples of a batch."""
        if bad:
            self._here.update(_known(sample.kind) for sample in bad)
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample._asdict()) + "\n" for sample in bad)

    def counts_here(self) -> list[int]:
        """Return how many of each of KINDS this rank has met since the run was opened."""
        return [self._here[kind] for kind in KINDS]

    def in_all(self, counts: Sequence[float]) -> dict[str, int]:
        """Return kind -> samples, of all ranks and from the start, given `counts_here` summed."""
        summed = {
            kind: int(count) + self._before.get(kind, 0)
            for kind, count in zip(KINDS, counts, strict=True)
        }
        return {kind: count for kind, count in summed.items() if count}


def drop_rows_after(folder: Path, position: int) -> dict[str, int]:
    """Remove rows of positions that a resumed run will come to again; count the others by kind.

    `position` is where it goes on in the order of data.
    """
    left: Counter[str] = Counter()
    for path in folder.glob(_PATTERN):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _position(line) < position]
        publish_text(path, "".join(f"{line}\n" for line in kept))
        left.update(_known(str(json.loads(line).get("kind"))) for line in kept)
    return dict(left)


def _known(kind: str) -> str:
    return kind if kind in KINDS else "other"


def _position(line: str) -> float:
    try:
        return float(json.loads(line)["position"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut by a kill


def check_share(counts: Mapping[str, int], *, samples_seen: int, limit: float, folder: str) -> None:
    """Raise DataError where more than the share `limit` of the samples seen were bad."""
    num_bad = sum(counts.values())
    if samples_seen >= _FIRST_CHECK and num_bad > limit * samples_seen:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items()))
        raise DataError(
            f"{num_bad:,} of {samples_seen:,} samples could not be used ({kinds}), more than "
            f"data.max_bad_fraction = {limit:g}. They are named in {folder}/{_PATTERN}. "
            "Curate the dataset, or raise the limit."
        )
