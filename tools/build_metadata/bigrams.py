"""Bigrams of large texts by pointwise mutual information, in bounded memory.

    PMI(a, b) = log2( n_ab * N / (n_a * n_b) )        (Church and Hanks, 1990)

n_ab counts b right behind a in a line (no mark between), n_a all words a, N all words. Pairs are
numbers; sorted runs of them lie in temporary files and are merged range by range, so that a
Wikipedia fits any machine.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.progress import progress
from tools.build_metadata.files import lines_of, tokens_of

_PAIRS_A_RUN = 16_000_000
_RECORD = np.dtype([("pair", "<u8"), ("count", "<i8")])
Records = npt.NDArray[Any]


def _summed(pairs: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64] | None = None) -> Records:
    values, places = np.unique(pairs, return_inverse=True)
    records = np.zeros(len(values), _RECORD)
    records["pair"] = values
    records["count"] = np.bincount(places, weights=counts, minlength=len(values))
    return records


def _runs(paths: Sequence[Path], ids: dict[str, int], folder: Path, size: int) -> list[Path]:
    """Write the pairs of the texts as sorted runs of (pair, count); return their files."""
    pairs: list[int] = []
    runs: list[Path] = []

    def flush() -> None:
        runs.append(folder / f"run-{len(runs):06d}.npy")
        np.save(runs[-1], _summed(np.array(pairs, np.uint64)))
        pairs.clear()

    with progress("bigrams", total=len(paths), unit="files") as bar:
        for path in paths:
            for line in lines_of(path):
                numbers = [ids.get(token) for token in tokens_of(line)]  # None: a mark
                pairs += [
                    a << 32 | b for a, b in pairwise(numbers) if a is not None and b is not None
                ]
                if len(pairs) >= size:
                    flush()
            bar.advance(1)
    flush()
    return runs


def _merged(runs: Sequence[Path], size: int) -> Iterator[Records]:
    """Yield the sums of all runs by ascending ranges of the pair."""
    loaded = [np.load(run, mmap_mode="r") for run in runs]
    largest = max(loaded, key=len)
    step = max(1, size // max(len(runs), 1))
    edges = [int(pair) for pair in largest["pair"][step::step]]
    ends = [*edges, 1 << 64]
    begin = 0
    for end in ends:
        parts = []
        for run in loaded:
            low = np.searchsorted(run["pair"], np.uint64(begin))
            high = len(run) if end == 1 << 64 else np.searchsorted(run["pair"], np.uint64(end))
            parts.append(np.array(run[low:high]))
        both = np.concatenate(parts)
        yield _summed(both["pair"], both["count"])
        begin = end


def bigrams_by_pmi(
    paths: Sequence[Path],
    counts: Counter[str],
    *,
    min_pmi: float,
    min_count: int,
    pairs_a_run: int = _PAIRS_A_RUN,
) -> dict[str, float]:
    """Return "a b" -> PMI of the bigrams with at least min_pmi and min_count.

    `counts` are those of all words of the same texts.
    """
    words = list(counts)
    ids = {word: number for number, word in enumerate(words)}
    numbers = np.array([counts[word] for word in words], np.float64)
    total = numbers.sum()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="pairmill-bigrams-") as folder:
        runs = _runs(paths, ids, Path(folder), pairs_a_run)
        for records in _merged(runs, pairs_a_run):
            frequent = records[records["count"] >= min_count]
            first = (frequent["pair"] >> np.uint64(32)).astype(np.int64)
            second = (frequent["pair"] & np.uint64(0xFFFFFFFF)).astype(np.int64)
            pmi = np.log2(frequent["count"] * total / (numbers[first] * numbers[second]))
            for row in np.flatnonzero(pmi >= min_pmi):
                found[f"{words[first[row]]} {words[second[row]]}"] = float(pmi[row])
    return found
