"""WFPP: word-frequency-based image-text pair pruning (Liang and Larson, arXiv:2410.10879).

    f(w) = count(w) / sum of counts, over words w with count >= min_count
    P(w) = 1 - sqrt(t / f(w))         the probability that a word is pruned
    score of a caption from P of its first 30 words; the fraction with the highest stays

Counting every word of a pool takes more than one worker's memory, so words are 64-bit hashes
(10 million of them share one with a chance of 3 in a million) and are summed by ranges of the hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from configs.publish import published_file
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import Pool, ShardPart, Solution, global_rules
from curation.global_rules.selection import Bound, Keys, key_of_float, select_smallest
from curation.global_rules.top_fraction import BELOW, num_wanted
from curation.global_rules.wfpp_words import hashed_words

NO_WORDS = "no words"
_WORDS = "_words"
_TABLE = "words.npy"
# Shards whose counts one task sums, and hashes of the pool that one task sums after that.
_SHARDS_A_GROUP = 256
_WORDS_A_RANGE = 20_000_000
WORD_COUNT = np.dtype([("hash", "<u8"), ("count", "<i8")])
WORD_PROBABILITY = np.dtype([("hash", "<u8"), ("probability", "<f8")])
FloatArray = npt.NDArray[np.float64]
Records = npt.NDArray[Any]


def prune_probability(counts: npt.ArrayLike, total: float, t: float) -> FloatArray:
    """Return P(w) = 1 - sqrt(t / f(w)), f = count / total. Negative where f < t."""
    result: FloatArray = 1.0 - np.sqrt(t / (np.asarray(counts, np.float64) / total))
    return result


def score_captions(
    probabilities: FloatArray, lengths: npt.NDArray[np.int64], compat: bool
) -> FloatArray:
    """Return the score of each caption from P of its words, one behind the other.

    `lengths`: words of each caption. A caption without words scores NaN. See `wfpp`.
    """
    scores = np.full(len(lengths), np.nan)
    some = lengths > 0
    if some.any():
        starts = (np.cumsum(lengths) - lengths)[some]
        n = lengths[some]
        product = np.multiply.reduceat(probabilities, starts)
        scores[some] = (1 - product) / n if compat else 1 - product ** (1 / n)
    return scores


def merge_counts(parts: list[Records]) -> Records:
    """Return the sum of some tables of (hash, count), sorted by hash."""
    both = np.concatenate(parts) if parts else np.zeros(0, WORD_COUNT)
    hashes, places = np.unique(both["hash"], return_inverse=True)
    summed = np.zeros(len(hashes), WORD_COUNT)
    summed["hash"] = hashes
    # bincount adds in float64, which is exact up to 2**53 words.
    summed["count"] = np.bincount(places, weights=both["count"], minlength=len(hashes))
    return summed


def _publish(path: Path, records: Records) -> None:
    with published_file(path) as file:
        np.save(file, records)


def _count_words(part: ShardPart, folder: Path) -> None:
    """Leave the counts of one shard."""
    path = folder / f"shard-{part.number:08d}.npy"
    if not path.exists():
        hashes = part.emitted(_WORDS)[_WORDS].combine_chunks().flatten().to_numpy()
        values, counts = np.unique(hashes, return_counts=True)
        records = np.zeros(len(values), WORD_COUNT)
        records["hash"], records["count"] = values, counts
        _publish(path, records)


@dataclass(frozen=True)
class _Group:
    sources: tuple[Path, ...]
    path: Path


def _sum_group(task: _Group) -> int:
    """Sum the counts of some shards; return the number of different words."""
    if task.path.exists():
        return len(np.load(task.path, mmap_mode="r"))
    summed = np.zeros(0, WORD_COUNT)
    for first in range(0, len(task.sources), 16):
        summed = merge_counts([summed, *map(np.load, task.sources[first : first + 16])])
    _publish(task.path, summed)
    return len(summed)


@dataclass(frozen=True)
class _Range:
    groups: tuple[Path, ...]
    path: Path
    bounds: tuple[int, int]  # of the hash: first <= hash <= last
    min_count: int


def _sum_range(task: _Range) -> tuple[int, int]:
    """Sum one range of the hash; return how many words are frequent enough, and their count."""
    if not task.path.exists():
        parts = []
        for path in task.groups:
            records = np.load(path, mmap_mode="r")
            low = int(np.searchsorted(records["hash"], np.uint64(task.bounds[0])))
            high = int(np.searchsorted(records["hash"], np.uint64(task.bounds[1]), side="right"))
            parts.append(np.array(records[low:high]))
        summed = merge_counts(parts)
        _publish(task.path, summed[summed["count"] >= task.min_count])
    records = np.load(task.path, mmap_mode="r")
    return len(records), int(records["count"].sum())


# Once a worker: the folder's name is the digest of all that made the table.
@lru_cache(maxsize=1)
def _read_table(folder: Path) -> Records:
    table: Records = np.load(folder / _TABLE, mmap_mode="r", allow_pickle=False)
    return table


def _lookup(hashes: npt.NDArray[np.uint64], table: Records, unknown: float) -> FloatArray:
    if not len(table):
        return np.full(len(hashes), unknown)
    at = np.minimum(np.searchsorted(table["hash"], hashes), len(table) - 1)
    return np.where(table["hash"][at] == hashes, table["probability"][at], unknown)


@dataclass(frozen=True)
class Scorer:
    """Scores the samples of a shard with the pool's table of words."""

    folder: Path
    unknown: float
    max_words: int
    compat: bool

    def scores(self, part: ShardPart) -> FloatArray:
        """Return the score of each sample; NaN without words (last, under compat: -1)."""
        words = part.emitted(_WORDS)[_WORDS].combine_chunks()
        offsets = words.offsets.to_numpy()
        full = np.diff(offsets)
        lengths = np.minimum(full, self.max_words).astype(np.int64)
        place = np.arange(int(full.sum())) - np.repeat(offsets[:-1] - offsets[0], full)
        hashes = words.flatten().to_numpy()[place < self.max_words]
        found = _lookup(hashes, _read_table(self.folder), self.unknown)
        scores = score_captions(found, lengths, self.compat)
        return np.where(np.isnan(scores), -1.0, scores) if self.compat else scores


def _keys_of(scorer: Scorer, part: ShardPart) -> Keys:
    scores = scorer.scores(part)
    has_score = ~np.isnan(scores)
    uids = part.emitted()["uid"].combine_chunks().filter(pa.array(has_score))
    return Keys("", key_of_float(-scores[has_score]), uids)


def _num_scored(part: ShardPart, scorer: Scorer) -> int:
    return len(_keys_of(scorer, part).keys)


class Wfpp:
    """The global rule; see `wfpp`."""

    def __init__(
        self, fraction: float, t: float, min_count: int, max_words: int, compat: bool
    ) -> None:
        self._fraction, self._t, self._min_count = fraction, t, min_count
        self._max_words, self._compat = max_words, compat
        self.emit_digest = "wfpp 1"
        self.solve_digest = f"{fraction} {t} {min_count} {max_words} {compat}"

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return the hashes of all words; they are not kept."""
        return {_WORDS: hashed_words(samples["caption"].to_pylist())}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Count the words of the pool, then find the last score that stays."""
        num_words, total = self._count(pool)
        scorer = Scorer(pool.folder, self._unknown(total), self._max_words, self._compat)
        scored = sum(n for _, n in pool.map(_num_scored, scorer, step="score"))
        k = num_wanted(scored, self._fraction)
        values: dict[str, Any] = {"num_words": num_words, "total": total, "bound": None}
        if k:
            keys_of = partial(_keys_of, scorer)
            values["bound"] = list(select_smallest(pool, keys_of, {"": scored}, {"": k})[""])
        return {**values, "num_scored": scored, "num_wanted": k, "unknown": scorer.unknown}

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop what is behind the bound."""
        unknown = solution.values["unknown"]
        scorer = Scorer(solution.folder, unknown, self._max_words, self._compat)
        scores = scorer.scores(part)
        is_kept = ~np.isnan(scores)
        no_words = ~is_kept
        found, bound = _keys_of(scorer, part), solution.values["bound"]
        is_kept[is_kept] = Bound(*bound).holds(found.keys, found.uids) if bound else False
        reasons = first_reason(len(scores), [(NO_WORDS, no_words), (BELOW, ~is_kept)])
        return Judgement({"score": pa.array(scores, mask=no_words)}, reasons)

    def _unknown(self, total: int) -> float:
        """Return P of a word that too few captions have."""
        if self._compat or not total:
            return 1.0
        rarest = max(self._min_count - 1, 1)
        return float(np.clip(prune_probability(rarest, total, self._t), 0, 1))

    def _count(self, pool: Pool) -> tuple[int, int]:
        """Publish the table of words; return its length and the sum of its counts."""
        for _ in pool.map(_count_words, pool.folder, step="count words"):
            pass
        groups = list(_groups(pool))
        found = pool.run(_sum_group, groups, step="sum words", unit="groups")
        num_hashes = sum(n for _, n in found)
        num_ranges = 1 + num_hashes // _WORDS_A_RANGE
        edges = [(i << 64) // num_ranges for i in range(num_ranges + 1)]
        ranges = [
            _Range(
                groups=tuple(group.path for group in groups),
                path=pool.folder / f"range-{i:06d}.npy",
                bounds=(edges[i], edges[i + 1] - 1),
                min_count=self._min_count,
            )
            for i in range(num_ranges)
        ]
        summed = dict(pool.run(_sum_range, ranges, step="sum words", unit="ranges"))
        num_words = sum(n for n, _ in summed.values())
        total = sum(n for _, n in summed.values())
        self._publish_table(pool.folder, [task.path for task in ranges], num_words, total)
        return num_words, total

    def _publish_table(self, folder: Path, ranges: list[Path], num_words: int, total: int) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(WORD_PROBABILITY)}
        with published_file(folder / _TABLE) as file:
            np.lib.format.write_array_header_2_0(
                file, {**header, "fortran_order": False, "shape": (num_words,)}
            )
            for path in ranges:
                records = np.load(path, mmap_mode="r")
                table = np.zeros(len(records), WORD_PROBABILITY)
                table["hash"] = records["hash"]
                found = prune_probability(records["count"], max(total, 1), self._t)
                # The released code takes a word rarer than t for the most frequent there is.
                rare = np.where(found < 0, 1.0, found) if self._compat else found
                table["probability"] = np.clip(rare, 0, 1)
                file.write(table.tobytes())


def _groups(pool: Pool) -> Iterator[_Group]:
    for first in range(0, pool.num_shards, _SHARDS_A_GROUP):
        numbers = range(first, min(first + _SHARDS_A_GROUP, pool.num_shards))
        sources = tuple(pool.folder / f"shard-{number:08d}.npy" for number in numbers)
        yield _Group(sources, pool.folder / f"group-{first:08d}.npy")


@global_rules.register("wfpp")
def wfpp(
    *,
    fraction: Annotated[float, Field(gt=0, le=1)],
    t: Annotated[float, Field(gt=0)] = 1e-7,
    min_count: Annotated[int, Field(ge=1)] = 5,
    max_words: Annotated[int, Field(ge=1)] = 30,
    compat: Literal["released"] | None = None,
) -> Wfpp:
    """Keep the fraction of samples whose captions have the highest scores.

    Words are those of CLIP's tokenizer; those counted less than `min_count` times in the pool are
    left out of the table. P(w) = 1 - sqrt(t / f(w)); a caption is scored by its first `max_words`
    words. floor(fraction * n) samples stay; equal scores are ordered by uid. Captions without words
    are dropped as "no words".

    The released code (compat: released) has traps that the default mends:
    - a word that is not in the table, or rarer than t, gets P = 1, as if it were the most frequent
      of all: so captions of rare words score 0 and go first. Default: a word rarer than t gets
      P = 0, one that is not in the table the P of the count min_count - 1;
    - the score is (1 - prod P) / n, which favours captions of one or two words, although its
      comment says geometric mean. Default: 1 - (prod P)^(1/n), the geometric mean;
    - a caption without words divides 0 by 0. Under compat it comes last, as it does there;
    - captions such as "NA" or "null" are missing values to pandas and crash it. Here they are text;
    - the sort is not stable among equal scores. Here uid decides, also under compat.
    """
    return Wfpp(fraction, t, min_count, max_words, compat == "released")
