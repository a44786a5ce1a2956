"""Hand rows from shards to partitions, and back, through files, in bounded memory.

A file holds the rows of one giver (a shard, a partition), one Arrow record batch for each taker
that gets any, and names the takers in its metadata, so that a taker reads its own bytes only.
Beyond MAX_FILES givers, files are merged in groups before anything is taken: no taker opens more.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.publish import published_file

if TYPE_CHECKING:  # global_rules imports curation/selectors, which import this
    from curation.global_rules.base import Pool

MAX_FILES = 512
SHARDS_PER_BUCKET = 64
_TAKERS = b"takers"
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclass(frozen=True)
class Collect:
    """Take what the files `paths` hold for one bucket of shards, and publish it at `result`."""

    paths: tuple[Path, ...]
    bucket: int
    result: Path

    def __str__(self) -> str:
        return f"shards {self.bucket * SHARDS_PER_BUCKET} and on"


def give(path: Path, table: pa.Table, takers: npt.NDArray[np.int64]) -> None:
    """Publish the rows of one giver; `takers` says who gets each."""
    order = np.argsort(takers, kind="stable")
    ordered = takers[order]
    table = table.take(pa.array(order)).combine_chunks()
    names, starts = np.unique(ordered, return_index=True)
    ends = np.append(starts, len(ordered))[1:]
    slices = (table.slice(start, end - start) for start, end in zip(starts, ends, strict=True))
    _write(path, table.schema, names.tolist(), slices)


def _write(path: Path, schema: pa.Schema, takers: list[int], tables: Iterable[pa.Table]) -> None:
    schema = schema.with_metadata({_TAKERS: json.dumps(takers).encode()})
    with published_file(path) as file, pa.ipc.new_file(file, schema, options=_OPTIONS) as writer:
        for table in tables:
            (batch,) = table.combine_chunks().to_batches()
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


class _Reader:
    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.OSFile(str(path)))
        self.schema = self._file.schema.remove_metadata()
        self.takers: list[int] = json.loads(self._file.schema.metadata[_TAKERS])

    def read(self, taker: int) -> pa.Table | None:
        """Return the rows of one taker; None where there are none."""
        at = bisect_left(self.takers, taker)
        if at == len(self.takers) or self.takers[at] != taker:
            return None
        batch = self._file.get_batch(at)
        return pa.Table.from_batches([batch]).replace_schema_metadata(None)


def take(paths: Sequence[Path], taker: int) -> pa.Table:
    """Return the rows that some givers have for one taker, in the order of the paths."""
    schema, tables = None, []
    for path in paths:
        reader = _Reader(path)
        schema = reader.schema
        table = reader.read(taker)
        if table is not None:
            tables.append(table)
    assert schema is not None, "somebody gives"
    return pa.concat_tables(tables).combine_chunks() if tables else schema.empty_table()


@dataclass(frozen=True)
class _Merge:
    paths: tuple[Path, ...]
    result: Path

    def __str__(self) -> str:
        return self.result.name


def _merge(task: _Merge) -> None:
    if task.result.exists():
        return
    readers = [_Reader(path) for path in task.paths]
    takers = sorted({taker for reader in readers for taker in reader.takers})

    def tables() -> Iterator[pa.Table]:
        for taker in takers:
            found = [t for reader in readers if (t := reader.read(taker)) is not None]
            yield pa.concat_tables(found)

    _write(task.result, readers[0].schema, takers, tables())


def merge_files(pool: Pool, paths: list[Path], *, step: str) -> list[Path]:
    """Merge files of givers, in their order, until there are at most MAX_FILES."""
    level = 0
    while len(paths) > MAX_FILES:
        level += 1
        folder = paths[0].parent.with_name(f"{paths[0].parent.name.split('~')[0]}~{level}")
        tasks = [
            _Merge(tuple(paths[start : start + MAX_FILES]), folder / f"{start // MAX_FILES}.arrow")
            for start in range(0, len(paths), MAX_FILES)
        ]
        for _ in pool.run(_merge, tasks, step=f"merge {step}", unit="files"):
            pass
        paths = [task.result for task in tasks]
    return paths
