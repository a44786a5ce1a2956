"""De-duplication as a global rule: of samples that are linked the best one stays.

    spill    (per shard)      records (bucket, item, rank) of each kind of links, by hash of the
                              bucket to partitions
    link     (per partition)  who is dropped for whom (links.py), by shard
    collect  (per 64 shards)  the first reason and the best sample of each that is dropped
    apply    (per shard)      the judgement

The driver holds file names only; a worker holds one shard, one partition, or what is dropped of 64
shards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from configs import draws
from configs.errors import ConfigError
from configs.publish import publish_text
from curation.dedup.exchange import SHARDS_PER_BUCKET, Collect, give, merge_files, take
from curation.dedup.kinds import PIXEL_KINDS, Kind, KindName, make_kind
from curation.dedup.links import IntArray, number_pairs
from curation.dedup.ranks import RANK_COLUMNS, UID_BYTES, Policy, make_ranks, rank_positions
from curation.filters.base import Judgement
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules

# A partition is one task: some 100 MB.
RECORDS_PER_PARTITION = 1_000_000
NOT_DECODED = "cannot be decoded"
DUPLICATE_OF = "duplicate_of"
DUPLICATE_SHARD = "duplicate_shard"
_DROPPED = pa.schema(
    [
        ("shard", pa.int32()),
        ("rank", pa.binary()),
        ("kind", pa.uint8()),  # position among the kinds of the rule
        ("better", pa.binary()),  # rank of the best sample that it is linked to
        ("better_shard", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Settings:
    """The keywords of the rule (see `dedup`), in a form that travels."""

    by: tuple[KindName, ...]
    keep: tuple[Policy, ...]
    distance: int
    max_color: float | None
    min_jaccard: float
    shingle: int
    url_column: str
    max_band: int

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of links, in order."""
        return _kinds(self)


@cache
def _kinds(settings: Settings) -> tuple[Kind, ...]:
    return tuple(
        make_kind(
            name,
            distance=settings.distance,
            max_color=settings.max_color,
            min_jaccard=settings.min_jaccard,
            shingle=settings.shingle,
            url_column=settings.url_column,
        )
        for name in settings.by
    )


def make_records(kind: Kind, samples: pa.Table, ranks: pa.Array, shard: int) -> pa.Table:
    """Return the records of the samples of one shard: high, low, rank, shard, and item if near."""
    records = kind.records(samples)
    columns = {
        "high": pa.array(records.high, pa.uint64()),
        "low": pa.array(records.low, pa.uint64()),
        "rank": ranks.take(pa.array(records.row)),
        "shard": pa.array(np.full(len(records.row), shard, np.int32)),
    }
    if records.item is not None:
        columns["item"] = records.item
    return pa.table(columns)


def find_dropped(
    kind: Kind, number: int, records: pa.Table, max_band: int
) -> tuple[pa.Table, IntArray]:
    """Return who of some whole buckets is dropped for whom (_DROPPED), and sizes of cut buckets."""
    bucket = number_pairs(records["high"].to_numpy(), records["low"].to_numpy())
    ranks = records["rank"].combine_chunks()
    item = records["item"].combine_chunks() if "item" in records.column_names else None
    linked = kind.link(bucket, rank_positions(ranks), item, max_band=max_band)
    rows = np.flatnonzero(linked.better >= 0)
    better = pa.array(linked.better[rows])
    dropped = pa.table(
        {
            "shard": records["shard"].take(pa.array(rows)),
            "rank": ranks.take(pa.array(rows)),
            "kind": pa.array(np.full(len(rows), number, np.uint8)),
            "better": ranks.take(better),
            "better_shard": records["shard"].take(better),
        },
        schema=_DROPPED,
    )
    return dropped, linked.cut


def first_of_each(dropped: pa.Table) -> pa.Table:
    """Return one row for each dropped sample: of its first kind, the best sample; by shard."""
    keys = [(name, "ascending") for name in ("shard", "rank", "kind", "better")]
    dropped = dropped.take(pc.sort_indices(dropped, sort_keys=keys)).combine_chunks()
    if not dropped.num_rows:
        return dropped
    ranks = dropped["rank"].combine_chunks()
    is_first = pc.not_equal(ranks[1:], ranks[:-1]).to_numpy(zero_copy_only=False)
    return dropped.filter(pa.array(np.append(True, is_first)))


def is_decoded(samples: pa.Table, kinds: Sequence[Kind]) -> pa.Array:
    """Return which samples have all hashes of pixels that the kinds compare."""
    decoded = pa.array(np.ones(samples.num_rows, bool))
    for kind in kinds:
        if kind.name in PIXEL_KINDS:
            decoded = pc.and_(decoded, samples[kind.name].combine_chunks().is_valid())
    return decoded


@dataclass(frozen=True)
class _Spill:
    folder: Path
    settings: Settings
    num_parts: tuple[int, ...]  # partitions of each kind


def spill_path(folder: Path, kind: Kind, shard: int) -> Path:
    """Return the file of a shard's records of one kind."""
    return folder / f"spill-{kind.name}" / f"{shard:08d}.arrow"


def _spill(part: ShardPart, task: _Spill) -> None:
    kinds = task.settings.kinds
    paths = [spill_path(task.folder, kind, part.number) for kind in kinds]
    if all(path.exists() for path in paths):
        return
    names = {*RANK_COLUMNS, *(column for kind in kinds for column in kind.columns)}
    samples = part.index(*sorted(names))
    samples = samples.filter(is_decoded(samples, kinds)).combine_chunks()
    ranks = make_ranks(samples, task.settings.keep)
    for kind, path, num_parts in zip(kinds, paths, task.num_parts, strict=True):
        records = make_records(kind, samples, ranks, part.number)
        words = (records["high"].to_numpy(), records["low"].to_numpy())
        parts = draws.bits(0, "dedup/partition", *words) % np.uint64(num_parts)
        give(path, records, parts.astype(np.int64))


@dataclass(frozen=True)
class _Link:
    settings: Settings
    number: int  # of the kind
    paths: tuple[Path, ...]
    part: int
    result: Path

    def __str__(self) -> str:
        return f"{self.settings.by[self.number]} partition {self.part}"


def _link(task: _Link) -> tuple[int, int]:
    """Return the number of buckets that were cut, and the number of items in the largest."""
    done = task.result.with_suffix(".json")
    if not done.exists():
        kind = task.settings.kinds[task.number]
        records = take(task.paths, task.part)
        dropped, cut = find_dropped(kind, task.number, records, task.settings.max_band)
        buckets = dropped["shard"].to_numpy().astype(np.int64) // SHARDS_PER_BUCKET
        give(task.result, dropped, buckets)
        publish_text(done, json.dumps([len(cut), int(cut.max(initial=0))]))
    num_cut, largest = json.loads(done.read_text())
    return num_cut, largest


def _collect(task: Collect) -> None:
    if not task.result.exists():
        dropped = first_of_each(take(task.paths, task.bucket))
        give(task.result, dropped, dropped["shard"].to_numpy().astype(np.int64))


def dropped_path(folder: Path, bucket: int) -> Path:
    """Return the file of what is dropped of 64 shards."""
    return folder / "dropped" / f"{bucket:06d}.arrow"


class Dedup:
    """See `dedup`."""

    emit_digest = "dedup"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kinds = settings.kinds
        self.solve_digest = repr(settings)

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the scan must compute."""
        return frozenset().union(*(kind.needs for kind in self._kinds))

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return nothing: all that is compared stands in the index."""
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Link the pool; return for each kind how many buckets were cut."""
        num_parts = tuple(
            max(1, -(-pool.num_samples * kind.num_bands // RECORDS_PER_PARTITION))
            for kind in self._kinds
        )
        for _ in pool.map(_spill, _Spill(pool.folder, self._settings, num_parts), step="spill"):
            pass
        linked: list[Path] = []
        cut = {}
        for number, kind in enumerate(self._kinds):
            paths = [spill_path(pool.folder, kind, shard) for shard in range(pool.num_shards)]
            paths = merge_files(pool, paths, step=kind.name)
            tasks = [
                _Link(
                    settings=self._settings,
                    number=number,
                    paths=tuple(paths),
                    part=part,
                    result=pool.folder / "linked" / f"{kind.name}-{part:06d}.arrow",
                )
                for part in range(num_parts[number])
            ]
            found = [n for _, n in pool.run(_link, tasks, step="link", unit="partitions")]
            linked += [task.result for task in tasks]
            cut[kind.name] = {
                "num_cut_bands": sum(num for num, _ in found),
                "largest_cut_band": max(largest for _, largest in found),
            }
        self._collect(pool, linked)
        for folder in pool.folder.iterdir():
            if folder.is_dir() and folder.name != "dropped":
                shutil.rmtree(folder)
        content: dict[str, Any] = {"max_band": self._settings.max_band, "kinds": cut}
        said = [
            f"{name}: {n:,} buckets hold more than {self._settings.max_band:,} different items "
            f"(max_band; the largest {found['largest_cut_band']:,}), and each of those is compared "
            "with that many best only"
            for name, found in cut.items()
            if (n := found["num_cut_bands"])
        ]
        return {**content, "warnings": said} if said else content

    def _collect(self, pool: Pool, linked: list[Path]) -> None:
        paths = tuple(merge_files(pool, linked, step="links"))
        tasks = [
            Collect(paths, bucket, dropped_path(pool.folder, bucket))
            for bucket in range(-(-pool.num_shards // SHARDS_PER_BUCKET))
        ]
        for _ in pool.run(_collect, tasks, step="collect", unit="buckets"):
            pass

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop what a better sample stands for."""
        pixels = [kind.name for kind in self._kinds if kind.name in PIXEL_KINDS]
        samples = part.index("uid", *pixels)
        bucket = part.number // SHARDS_PER_BUCKET
        dropped = take([dropped_path(solution.folder, bucket)], part.number)
        return judge_dropped(samples, dropped, self._kinds)


def judge_dropped(samples: pa.Table, dropped: pa.Table, kinds: Sequence[Kind]) -> Judgement:
    """Judge the samples of one shard by its rows of _DROPPED, one a sample."""
    row_of = {uid: row for row, uid in enumerate(samples["uid"].to_pylist())}
    num = samples.num_rows
    reasons: list[str | None] = [None] * num
    better: list[bytes | None] = [None] * num
    better_shard: list[int | None] = [None] * num
    for found in dropped.to_pylist():
        row = row_of[found["rank"][-UID_BYTES:]]
        reasons[row] = kinds[found["kind"]].reason
        better[row] = found["better"][-UID_BYTES:]
        better_shard[row] = found["better_shard"]
    decoded = is_decoded(samples, kinds).to_pylist()
    why = [reason if ok else NOT_DECODED for ok, reason in zip(decoded, reasons, strict=True)]
    values = {
        DUPLICATE_OF: pa.array(better, pa.binary(UID_BYTES)),
        DUPLICATE_SHARD: pa.array(better_shard, pa.int32()),
    }
    return Judgement(values, pa.array(why, pa.string()))


@global_rules.register("dedup")
def dedup(
    *,
    by: Annotated[tuple[KindName, ...], Field(min_length=1)],
    keep: tuple[Policy, ...] = ("resolution", "caption_length", "key"),
    distance: Annotated[int, Field(ge=0, le=15)] = 3,
    max_color: Annotated[float, Field(ge=0, le=255)] | None = 16.0,
    min_jaccard: Annotated[float, Field(gt=0, le=1)] = 0.8,
    shingle: Annotated[int, Field(ge=1)] = 4,
    url_column: str = "json.url",
    max_band: Annotated[int, Field(ge=1)] = 2000,
) -> GlobalRule:
    """Drop a sample iff one that it is linked to ranks better.

    Links, any of `by`:

    image    the same bytes                   same image
    url      the same `url_column`            same url
    caption  the same normalised caption      same caption
    phash    up to `distance` bits of the     similar image
    dhash    64-bit hashes differ, and the    similar image
             colours of 4 x 4 parts by
             `max_color` of 255 in the mean
    text     the sets of `shingle`-character  similar caption
             runs of the normalised captions
             have a Jaccard similarity of at
             least `min_jaccard` (2 % of the
             pairs that just have it are missed)

    The better one: most pixels, then the longest caption, then the first key (`keep`, in order),
    then the smallest uid. One hop: a sample also goes for one that itself goes for another, and
    nobody goes for a chain of others. So the result is the same in any order. The decisions say in
    `duplicate_of` for whom a sample goes (the best one of the first link in `by` that drops it),
    and in `duplicate_shard` where that lies (row of decided.parquet).

    An image that phash or dhash cannot decode is dropped, "cannot be decoded". In a bucket with
    more than `max_band` different hashes or texts each is compared with the max_band best only;
    the solution counts such buckets. Near-by hashes meet in distance + 1 bands of 64 / (distance +
    1) bits: beyond 3 the buckets of a large pool are full. The hashes are of gray images, for which
    the flags of Ireland and Peru are one: colours tell them apart; with max_color: null a gray
    copy of a picture is a duplicate too.
    """
    if len(set(by)) < len(by):
        raise ConfigError(f"dedup: a kind of links stands twice in by: {', '.join(by)}.")
    return Dedup(
        Settings(by, keep, distance, max_color, min_jaccard, shingle, url_column, max_band)
    )
