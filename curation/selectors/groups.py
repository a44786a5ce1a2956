"""Bring the samples of a group together with their vectors, and hand back what is found.

A group is a cluster, or a random batch. Shards hand their rows to partitions of whole groups
(dedup/exchange.py), each task holds one partition, its samples in an order that depends on no
shard: by group, then by rank, which ends with the uid. What it finds goes back by shard.

    spill (per shard) -> work (per partition) -> collect (per 64 shards) -> `found` (in apply)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from configs.publish import publish_text, published_file
from curation.dedup.exchange import SHARDS_PER_BUCKET, Collect, give, merge_files, take
from curation.dedup.ranks import UID_BYTES
from curation.global_rules.base import Pool, ShardPart

IntArray = npt.NDArray[np.int64]
BYTES_PER_PARTITION = 128 << 20


@dataclass(frozen=True)
class Members:
    """The samples of a shard that take part."""

    rows: IntArray  # among the samples of the part
    group: IntArray
    rank: pa.Array  # binary, the smaller the better; ends with the uid


MembersOf = Callable[[ShardPart], Members]


@dataclass(frozen=True)
class Group:
    """The samples of one group, by rank."""

    number: int
    ranks: pa.Array
    shards: pa.Array
    vectors: dict[str, npt.NDArray[np.float16]]  # name -> [n, dim]

    @property
    def uids(self) -> list[bytes]:
        """The uids of the samples."""
        return [rank[-UID_BYTES:] for rank in self.ranks.to_pylist()]

    def result(self, **columns: npt.ArrayLike | pa.Array) -> pa.Table:
        """Return a table of what was found of each sample, with whose it is."""
        made = {n: c if isinstance(c, pa.Array) else pa.array(c) for n, c in columns.items()}
        uid = pa.array(self.uids, pa.binary(UID_BYTES))
        return pa.table({"shard": self.shards, "uid": uid, **made})


# What a rule does with one group: returns Group.result, and numbers that are summed over groups.
Work = Callable[[Group, Any], tuple[pa.Table, dict[str, int]]]


@dataclass(frozen=True)
class GroupWork:
    """What a rule does with the groups of a pool."""

    members_of: MembersOf
    names: tuple[str, ...]  # of the vectors that travel
    work: Work
    argument: Any = None


def _count(part: ShardPart, task: GroupWork) -> tuple[IntArray, int]:
    """Return the samples of each group, and the bytes that the vectors of one take."""
    members = task.members_of(part)
    if not len(members.rows):
        return np.zeros(0, np.int64), 0
    row_bytes = sum(2 * part.vectors(name).shape[1] for name in task.names)
    return np.bincount(members.group).astype(np.int64), row_bytes


def _group_sizes(pool: Pool, task: GroupWork) -> tuple[IntArray, int]:
    sizes, row_bytes = np.zeros(0, np.int64), 0
    for _, (some, num_bytes) in pool.map(_count, task, step="count"):
        if len(some) > len(sizes):
            sizes = np.append(sizes, np.zeros(len(some) - len(sizes), np.int64))
        sizes[: len(some)] += some
        row_bytes = max(row_bytes, num_bytes)
    return sizes, row_bytes


def pack(sizes: IntArray, row_bytes: int) -> IntArray:
    """Return the partition of each group: whole groups, in order, of about 128 MiB of vectors."""
    before = np.cumsum(sizes) - sizes
    return before * row_bytes // BYTES_PER_PARTITION


@dataclass(frozen=True)
class _Spill:
    folder: Path
    members_of: MembersOf
    names: tuple[str, ...]


def _spill(part: ShardPart, task: _Spill) -> bool:
    """Hand over the members of a shard; tell whether there are any."""
    path = task.folder / "spill" / f"{part.number:08d}.arrow"
    if path.exists():
        return True
    members = task.members_of(part)
    if not len(members.rows):
        return False
    columns = {
        "group": pa.array(members.group),
        "rank": members.rank,
        "shard": pa.array(np.full(len(members.rows), part.number, np.int32)),
    }
    for name in task.names:
        columns[f"vector {name}"] = _packed(part.vectors(name)[members.rows])
    partition = np.load(task.folder / "spill" / "partitions.npy", allow_pickle=False)
    give(path, pa.table(columns), partition[members.group])
    return True


def _packed(vectors: npt.NDArray[np.float16]) -> pa.Array:
    data = np.ascontiguousarray(vectors)
    kind = pa.binary(2 * data.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(data), [None, pa.py_buffer(data)])


def _unpacked(column: pa.ChunkedArray) -> npt.NDArray[np.float16]:
    array = column.combine_chunks()
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width :][: len(array) * width]
    vectors: npt.NDArray[np.float16] = data.view(np.float16).reshape(len(array), width // 2)
    return vectors


@dataclass(frozen=True)
class _Partition:
    paths: tuple[Path, ...]
    number: int
    names: tuple[str, ...]
    work: Work
    argument: Any
    result: Path

    def __str__(self) -> str:
        return f"partition {self.number}"


def groups_of(table: pa.Table, names: Sequence[str]) -> Iterator[Group]:
    """Yield the groups of a partition's rows, each by rank."""
    keys = pa.table({name: table[name] for name in ("group", "rank")})
    order = pc.sort_indices(keys, [("group", "ascending"), ("rank", "ascending")])
    numbers = table["group"].to_numpy()[order.to_numpy()]
    vectors = {name: _unpacked(table[f"vector {name}"]) for name in names}
    starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])[: len(numbers)])
    for start, end in zip(starts, np.append(starts, len(numbers))[1:], strict=True):
        rows = order[start:end]
        yield Group(
            number=int(numbers[start]),
            ranks=table["rank"].take(rows).combine_chunks(),
            shards=table["shard"].take(rows).combine_chunks(),
            vectors={name: array[rows.to_numpy()] for name, array in vectors.items()},
        )


def _work(task: _Partition) -> dict[str, int]:
    done = task.result.with_suffix(".json")
    if not done.exists():
        tables, sums = [], dict[str, int]()
        for group in groups_of(take(task.paths, task.number), task.names):
            table, numbers = task.work(group, task.argument)
            tables.append(table)
            for name, number in numbers.items():
                sums[name] = sums.get(name, 0) + number
        found = pa.concat_tables(tables).combine_chunks()
        give(task.result, found, found["shard"].to_numpy().astype(np.int64) // SHARDS_PER_BUCKET)
        publish_text(done, json.dumps(sums))
    return dict(json.loads(done.read_text()))


def _collect(task: Collect) -> None:
    if not task.result.exists():
        found = take(task.paths, task.bucket)
        order = pc.sort_indices(found, [("shard", "ascending"), ("uid", "ascending")])
        found = found.take(order).combine_chunks()
        give(task.result, found, found["shard"].to_numpy().astype(np.int64))


def _found_path(folder: Path, bucket: int) -> Path:
    return folder / "found" / f"{bucket:06d}.arrow"


def work_on_groups(pool: Pool, task: GroupWork) -> dict[str, int]:
    """Run the work on every group; return its numbers, summed, and those of the groups.

    What was found of the samples is there for `found` afterwards. A run that was killed goes on.
    """
    done = pool.folder / "found" / "sums.json"
    if not done.exists():
        sizes, row_bytes = _group_sizes(pool, task)
        sums = {
            "num_groups": int(np.count_nonzero(sizes)),
            "num_samples": int(sizes.sum()),
            "largest_group": int(sizes.max(initial=0)),
        }
        if sizes.sum():
            sums |= _work_on_partitions(pool, task, pack(sizes, row_bytes), sizes)
        publish_text(done, json.dumps(sums))
    for folder in pool.folder.iterdir():
        if folder.is_dir() and folder.name != "found":
            shutil.rmtree(folder)
    return dict(json.loads(done.read_text()))


def _work_on_partitions(
    pool: Pool, task: GroupWork, partitions: IntArray, sizes: IntArray
) -> dict[str, int]:
    with published_file(pool.folder / "spill" / "partitions.npy") as file:
        np.save(file, partitions, allow_pickle=False)
    spill = _Spill(pool.folder, task.members_of, task.names)
    paths = [
        pool.folder / "spill" / f"{n:08d}.arrow"
        for n, some in pool.map(_spill, spill, step="spill")
        if some
    ]
    merged = tuple(merge_files(pool, sorted(paths), step="vectors"))
    tasks = [
        _Partition(
            paths=merged,
            number=int(number),
            names=task.names,
            work=task.work,
            argument=task.argument,
            result=pool.folder / "work" / f"{int(number):06d}.arrow",
        )
        for number in np.unique(partitions[sizes > 0])
    ]
    sums: dict[str, int] = {}
    for _, numbers in pool.run(_work, tasks, step="compare", unit="partitions"):
        for name, number in numbers.items():
            sums[name] = sums.get(name, 0) + number
    collect = tuple(merge_files(pool, [t.result for t in tasks], step="results"))
    buckets = [
        Collect(collect, bucket, _found_path(pool.folder, bucket))
        for bucket in range(-(-pool.num_shards // SHARDS_PER_BUCKET))
    ]
    for _ in pool.run(_collect, buckets, step="collect", unit="buckets"):
        pass
    return sums


def found(folder: Path, part: ShardPart, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Return what was found of the samples of a shard, in their order: uid, and columns of `types`.

    Null for a sample of no group.
    """
    uids = part.values("uid")["uid"].combine_chunks()
    path = _found_path(folder, part.number // SHARDS_PER_BUCKET)
    if not path.exists():
        return pa.table({"uid": uids, **{n: pa.nulls(len(uids), t) for n, t in types.items()}})
    table = take([path], part.number)
    at = pc.index_in(uids, value_set=table["uid"].combine_chunks())
    return pa.table({"uid": uids, **{n: table[n].combine_chunks().take(at) for n in types}})
