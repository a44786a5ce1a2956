"""Drop captions that too many samples of the pool have."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from configs import draws
from curation.dedup.exchange import SHARDS_PER_BUCKET, give, merge_files, take
from curation.dedup.kinds import caption_digest, digest_words
from curation.dedup.links import number_pairs
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules

RECORDS_PER_PARTITION = 4_000_000
REASON = "too frequent"
COUNT = "count"
_NO_CAPTION = bytes(16)


def _digests(samples: pa.Table) -> list[bytes]:
    return [caption_digest(caption) or _NO_CAPTION for caption in samples["caption"].to_pylist()]


@dataclass(frozen=True)
class _Spill:
    folder: Path
    num_parts: int


def _spill_path(folder: Path, shard: int) -> Path:
    return folder / "spill" / f"{shard:08d}.arrow"


def _spill(part: ShardPart, task: _Spill) -> None:
    path = _spill_path(task.folder, part.number)
    if path.exists():
        return
    counted = Counter(_digests(part.index("caption")))
    high, low = digest_words(list(counted))
    table = pa.table(
        {
            "high": high,
            "low": low,
            "count": pa.array(counted.values(), pa.int64()),
            "shard": pa.array(np.full(len(counted), part.number, np.int32)),
        }
    )
    parts = draws.bits(0, "caption_count/partition", high, low) % np.uint64(task.num_parts)
    give(path, table, parts.astype(np.int64))


@dataclass(frozen=True)
class _Task:
    paths: tuple[Path, ...]
    number: int  # of the partition, or of the bucket of shards
    result: Path

    def __str__(self) -> str:
        return self.result.name


def sum_counts(records: pa.Table) -> pa.Table:
    """Return the records with `count` summed over all that share (high, low), where above 1."""
    pair = number_pairs(records["high"].to_numpy(), records["low"].to_numpy())
    totals = np.zeros(len(pair), np.int64)
    np.add.at(totals, pair, records["count"].to_numpy())
    at = records.column_names.index("count")
    summed = records.set_column(at, "count", pa.array(totals[pair]))
    return summed.filter(pa.array(totals[pair] > 1))


def _sum(task: _Task) -> None:
    if not task.result.exists():
        summed = sum_counts(take(task.paths, task.number))
        give(task.result, summed, summed["shard"].to_numpy().astype(np.int64) // SHARDS_PER_BUCKET)


def _collect(task: _Task) -> None:
    if not task.result.exists():
        found = take(task.paths, task.number)
        give(task.result, found, found["shard"].to_numpy().astype(np.int64))


def _count_path(folder: Path, bucket: int) -> Path:
    return folder / "counts" / f"{bucket:06d}.arrow"


class CaptionCount:
    """See `caption_count`."""

    emit_digest = "caption_count"

    def __init__(self, max_count: int) -> None:
        self._max_count = max_count
        self.solve_digest = str(max_count)

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return nothing: the caption stands in the index."""
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Count the captions of the pool, partition by partition."""
        num_parts = max(1, -(-pool.num_samples // RECORDS_PER_PARTITION))
        for _ in pool.map(_spill, _Spill(pool.folder, num_parts), step="spill"):
            pass
        paths = [_spill_path(pool.folder, shard) for shard in range(pool.num_shards)]
        spilled = tuple(merge_files(pool, paths, step="captions"))
        summing = [
            _Task(spilled, part, pool.folder / "summed" / f"{part:06d}.arrow")
            for part in range(num_parts)
        ]
        for _ in pool.run(_sum, summing, step="count", unit="partitions"):
            pass
        summed = tuple(merge_files(pool, [task.result for task in summing], step="counts"))
        collecting = [
            _Task(summed, bucket, _count_path(pool.folder, bucket))
            for bucket in range(-(-pool.num_shards // SHARDS_PER_BUCKET))
        ]
        for _ in pool.run(_collect, collecting, step="collect", unit="buckets"):
            pass
        for folder in pool.folder.iterdir():
            if folder.is_dir() and folder.name != "counts":
                shutil.rmtree(folder)
        return {"max_count": self._max_count}

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop the captions that are too many."""
        digests = _digests(part.index("caption"))
        found = take([_count_path(solution.folder, part.number // SHARDS_PER_BUCKET)], part.number)
        words = np.stack([found["high"].to_numpy(), found["low"].to_numpy()], axis=1)
        keys = words.astype(">u8").tobytes()
        count_of = {keys[16 * i : 16 * i + 16]: n for i, n in enumerate(found["count"].to_pylist())}
        counts = np.array([count_of.get(digest, 1) for digest in digests], np.int64)
        tests = [(REASON, counts > self._max_count)]
        return Judgement({COUNT: pa.array(counts)}, first_reason(len(counts), tests))


@global_rules.register("caption_count")
def caption_count(*, max_count: Annotated[int, Field(ge=1)]) -> GlobalRule:
    """Drop samples whose caption more than `max_count` samples have, all of them.

    Counted are the samples that reached the rule; captions are compared normalised: NFKC, case
    folded, single blanks. A caption that stands under thousands of images names none of them ("the
    title of the collection"). To keep one of each instead see `dedup` by caption; to thin out
    frequent words, a balancer.
    """
    return CaptionCount(max_count)
