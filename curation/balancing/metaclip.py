"""MetaCLIP balancing (Xu et al., "Demystifying CLIP Data", arXiv:2309.16671, Algorithm 1).

    p_e = t / max(count_e, t)                 of an entry e that count_e captions of the pool have
    keep = 1 - prod_{e in caption} (1 - p_e)  of a caption

The paper draws once for each (caption, entry) and keeps a caption that any of its entries draws;
that is one draw with the probability above, and here the draw is a function of the sample's uid,
so that the result is the same on any machine. A tail entry (count <= t) keeps all its captions; a
caption without an entry is dropped.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from curation.balancing.base import Balancer, FloatArray, IntArray, balancers
from curation.balancing.matching import EntryMatcher
from curation.balancing.metadata import load_metadata, metadata_digest
from curation.global_rules.base import Pool


def entry_probability(counts: npt.ArrayLike, t: float) -> npt.NDArray[np.float64]:
    """Return p_e of each entry, in (0, 1]."""
    return t / np.maximum(np.asarray(counts, dtype=np.float64), t)


def keep_probability(
    matched: pa.Array, probability: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return 1 - prod(1 - p_e) over each sample's entries; 0 where there are none."""
    ids = matched.flatten().to_numpy(zero_copy_only=False)
    lengths = matched.value_lengths().to_numpy(zero_copy_only=False)
    keep = np.zeros(len(lengths))
    some = lengths > 0
    if some.any():
        starts = (np.cumsum(lengths) - lengths)[some]
        keep[some] = 1.0 - np.multiply.reduceat(1.0 - probability[ids], starts)
    return keep


# Once a worker process: building the automaton takes seconds. The digest notices a changed file.
@lru_cache(maxsize=1)
def _entries(path: str, digest: str) -> list[str]:
    return load_metadata(path)


@lru_cache(maxsize=1)
def _matcher(path: str, digest: str) -> EntryMatcher:
    return EntryMatcher(_entries(path, digest))


class _MetaClip(Balancer):
    def __init__(self, metadata: str, t: float) -> None:
        self._file = (metadata, metadata_digest(metadata))
        self._t = t

    @property
    def entries(self) -> list[str]:
        return _entries(*self._file)

    @property
    def emit_digest(self) -> str:
        return f"metaclip {self._file[1]}"

    @property
    def solve_digest(self) -> str:
        return f"{self._t}"

    def match(self, samples: pa.Table) -> pa.Array:
        ids = _matcher(*self._file).match(samples["caption"].to_pylist())
        return pa.array(ids, pa.list_(pa.int32()))

    def threshold(self, pool: Pool, counts: IntArray) -> dict[str, Any]:
        return {"t": self._t}

    def keep_probability(self, matched: pa.Array, counts: IntArray, t: float) -> FloatArray:
        return keep_probability(matched, entry_probability(counts, t))


@balancers.register("metaclip")
def metaclip(*, metadata: Path, t: Annotated[float, Field(gt=0)]) -> Balancer:
    """Balance captions over the entries of a metadata list.

    `metadata` is the file of the list (see metadata.py). `t` is the paper's t, the number of
    captions that an entry keeps for certain ("max per entry"): 20,000 for its 400 million pairs,
    170,000 for 2.5 billion. Smaller is flatter. Matching: see matching.py.
    """
    return _MetaClip(str(metadata), t)
