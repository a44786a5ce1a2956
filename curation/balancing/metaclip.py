"""MetaCLIP balancing (Xu et al., "Demystifying CLIP Data", arXiv:2309.16671, Algorithm 1).

    p_e = t / max(count_e, t)                 of an entry e that count_e captions of the pool have
    keep = 1 - prod_{e in caption} (1 - p_e)  of a caption

The paper draws once for each (caption, entry) and keeps a caption that any of its entries draws;
that is one draw with the probability above, and here the draw is a function of the sample's uid,
so that the result is the same on any machine. A tail entry (count <= t) keeps all its captions; a
caption without an entry is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from configs.errors import UsageError
from curation.balancing.base import ENTRIES, Balancer, FloatArray, IntArray, balancers
from curation.balancing.matching import EntryMatcher
from curation.balancing.metadata import load_metadata, metadata_digest

Threshold = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(gt=0)]


# Once a worker process: building the automaton takes seconds. The digest notices a changed file.
@lru_cache(maxsize=1)
def _entries(path: str, digest: str) -> list[str]:
    return load_metadata(path)


@lru_cache(maxsize=1)
def _matcher(path: str, digest: str) -> EntryMatcher:
    return EntryMatcher(load_metadata(path))


@lru_cache(maxsize=8)
def _num_entries(path: str, digest: str) -> int:
    return len(load_metadata(path))


class MetaClip(Balancer):
    """Balances captions over one list of entries."""

    def __init__(self, metadata: str, t: float | None, target_size: int | None) -> None:
        super().__init__(t, target_size)
        self._file = (metadata, metadata_digest(metadata))

    @property
    def emit_digest(self) -> str:
        """Digest of the metadata: another `t` matches nothing again."""
        return f"metaclip {self._file[1]}"

    @property
    def starts(self) -> IntArray:
        """One group."""
        return np.array([0, _num_entries(*self._file)])

    def match(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return the entries of the captions."""
        return {ENTRIES: _matcher(*self._file).match(samples["caption"].to_pylist())}

    def scale(self, counts: IntArray) -> Callable[[float], FloatArray]:
        """The threshold is t."""
        return lambda t: np.array([t])

    def entry_table(self) -> pa.Table:
        """Return the entries in the order of the metadata."""
        return pa.table({"entry": pa.array(_entries(*self._file), pa.string())})

    def describe(self) -> str:
        """Return how many entries, and of which file."""
        return f"{_num_entries(*self._file):,} entries in {self._file[0]}"


def check_threshold(name: str, t: float | None, target_size: int | None) -> None:
    """Raise UsageError unless one of the two is given."""
    if (t is None) == (target_size is None):
        got = "neither" if t is None else "both"
        raise UsageError(
            f"{name} has {got} of t and target_size. Give one: `t`, the captions that an entry "
            "keeps for certain, or `target_size`, the number of samples to keep (t is solved)."
        )


@balancers.register("metaclip")
def metaclip(
    *, metadata: Path, t: Threshold | None = None, target_size: Size | None = None
) -> MetaClip:
    """Balance captions over the entries of a metadata list.

    `metadata` is the file of the list (see metadata.py). `t` is the paper's t, the number of
    captions that an entry keeps for certain ("max per entry"): 20,000 for its 400 million pairs,
    170,000 for 2.5 billion. Smaller is flatter. `target_size` instead of `t` solves t so that this
    many samples are kept (target.py). Matching: see matching.py.
    """
    check_threshold("metaclip", t, target_size)
    return MetaClip(str(metadata), t, target_size)
