"""Make one output shard: copy the raw spans of its samples; index and digest are made as written.

No member is decoded or packed anew: header blocks and data go over as they are, so that the images
are the very bytes that came in. Only a sample whose key came before in the output gets new
headers.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
import xxhash

from configs.errors import DataError
from configs.publish import published_file
from curation.index import (
    IndexInfo,
    fingerprint_of,
    index_path,
    read_index_info,
    table_of_rows,
    write_index,
)
from curation.order import TAR
from curation.shards import BLOCK, SpanReader, padded

_END_OF_ARCHIVE = bytes(2 * BLOCK)
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class SourceTar:
    """A tar to copy from, as it was when it was scanned."""

    path: str
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Segment:
    """Some samples of a block: one row group of its order. `start`: position in the output."""

    block: Path
    row_group: int
    start: int
    tars: tuple[SourceTar, ...]  # of the block


@dataclass(frozen=True, kw_only=True)
class CopyTask:
    """Make the output shard `path`. `renames`: files of positions whose sample gets a new key."""

    path: Path
    segments: tuple[Segment, ...]
    renames: tuple[Path, ...]
    source: str
    plan: str

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class Copied:
    """An output shard."""

    num_samples: int
    num_bytes: int
    digest: str


def copy_shard(task: CopyTask) -> Copied:
    """Make one output shard and its index, unless an earlier run of this plan has."""
    index = index_path(task.path)
    info = read_index_info(index)
    if info is None or info.plan != task.plan or _fingerprint(task.path) != info.fingerprint:
        index.unlink(missing_ok=True)  # so that an index always belongs to the tar beside it
        info = _copy(task, index)
    assert info.digest is not None
    return Copied(num_samples=info.num_samples, num_bytes=info.num_bytes, digest=info.digest)


def _fingerprint(path: Path) -> str | None:
    """Return the fingerprint of a tar; None where there is none."""
    if not path.is_file():
        return None
    with SpanReader(path) as reader:
        return fingerprint_of(reader)


def _copy(task: CopyTask, index: Path) -> IndexInfo:
    rows: list[dict[str, Any]] = []
    with published_file(task.path) as file:
        writer = _TarWriter(file)
        for segment in task.segments:
            renamed = _renamed_rows(task, segment)
            with _Tars(segment.tars) as tars:
                for number, row in enumerate(_read_rows(segment)):
                    if number in renamed:
                        row["key"] = f"{row['key']}-{row['uid'].hex()[:8]}"
                        writer.add_renamed(tars.reader(row.pop(TAR)), row)
                    else:
                        writer.add(tars.reader(row.pop(TAR)), row)
                    rows.append(row)
        num_bytes = writer.finish()
    info = IndexInfo(
        source=task.source,
        shard=task.path.name,
        num_bytes=num_bytes,
        num_samples=len(rows),
        plan=task.plan,
        digest=f"xxh3-128:{writer.hasher.hexdigest()}",
        fingerprint=_fingerprint(task.path),
    )
    write_index(index, table_of_rows(rows), info)
    return info


def _read_rows(segment: Segment) -> Iterator[dict[str, Any]]:
    table = pq.ParquetFile(segment.block).read_row_group(segment.row_group)
    for batch in table.to_batches(max_chunksize=1000):
        yield from batch.to_pylist()


def _renamed_rows(task: CopyTask, segment: Segment) -> set[int]:
    """Return the rows of a segment whose samples get a new key."""
    num_rows = pq.read_metadata(segment.block).row_group(segment.row_group).num_rows
    rows: set[int] = set()
    for path in task.renames:
        positions = np.load(path, allow_pickle=False)
        low, high = np.searchsorted(positions, [segment.start, segment.start + num_rows])
        rows.update((positions[low:high] - np.uint64(segment.start)).tolist())
    return rows


class _Tars:
    """The source tars of a block, opened when first needed."""

    def __init__(self, tars: tuple[SourceTar, ...]) -> None:
        self._tars = tars
        self._readers: dict[int, SpanReader] = {}

    def __enter__(self) -> _Tars:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def reader(self, number: int) -> SpanReader:
        if number not in self._readers:
            tar = self._tars[number]
            reader = self._readers[number] = SpanReader(tar.path)
            if reader.num_bytes != tar.num_bytes or fingerprint_of(reader) != tar.fingerprint:
                raise DataError(
                    f"{tar.path} is not the tar that was scanned ({tar.num_bytes:,} bytes then, "
                    f"{reader.num_bytes:,} now): it changed since. Restore it, or run the same "
                    "line again with all stages."
                )
        return self._readers[number]


class _TarWriter:
    """Appends samples to a tar, hashes what it writes, and moves the rows' offsets."""

    def __init__(self, file: IO[bytes]) -> None:
        self.hasher = xxhash.xxh3_128()
        self._file = file
        self._waiting: list[bytes] = []
        self._num_waiting = 0
        self._at = 0

    def add(self, reader: SpanReader, row: dict[str, Any]) -> None:
        """Copy the members of a sample; neighbours in the source go over in one piece."""
        columns = (row["member_start"], row["member_offset"], row["member_size"])
        starts: list[int] = []
        offsets: list[int] = []
        first = end = columns[0][0]
        for start, offset, size in zip(*columns, strict=True):
            if start != end:
                self._copy(reader, first, end)
                first = start
            # Where this member lands: what waits in [first, start) goes before it.
            starts.append(self._at + start - first)
            offsets.append(self._at + offset - first)
            end = offset + padded(size)
        self._copy(reader, first, end)
        self._move(row, starts, offsets)

    def add_renamed(self, reader: SpanReader, row: dict[str, Any]) -> None:
        """Copy the data of a sample's members under headers with its new key."""
        starts, offsets = [], []
        for extension, offset, size in zip(
            row["member_ext"], row["member_offset"], row["member_size"], strict=True
        ):
            header = tarfile.TarInfo(f"{row['key']}.{extension}")
            header.size = size
            starts.append(self._at)
            self._append(header.tobuf(tarfile.GNU_FORMAT, "utf-8"))
            offsets.append(self._at)
            self._copy(reader, offset, offset + padded(size))
        self._move(row, starts, offsets)

    def _move(self, row: dict[str, Any], starts: list[int], offsets: list[int]) -> None:
        row["image_offset"] = offsets[row["member_offset"].index(row["image_offset"])]
        row["member_start"], row["member_offset"] = starts, offsets

    def _copy(self, reader: SpanReader, start: int, end: int) -> None:
        while start < end:
            size = min(end - start, _CHUNK_BYTES)
            data = reader.read(start, size)
            if len(data) < size:  # the last member of a tar may lack its padding, nothing else
                if start + len(data) < reader.num_bytes or end - reader.num_bytes >= BLOCK:
                    raise DataError(f"a shard shrank while it was copied (at byte {start}).")
                data += bytes(size - len(data))
            self._append(data)
            start += size

    def _append(self, data: bytes) -> None:
        self._waiting.append(data)
        self._num_waiting += len(data)
        self._at += len(data)
        if self._num_waiting >= _CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        data = b"".join(self._waiting)
        self.hasher.update(data)
        self._file.write(data)
        self._waiting, self._num_waiting = [], 0

    def finish(self) -> int:
        """Write the end-of-archive blocks; return the size of the tar in bytes."""
        self._append(_END_OF_ARCHIVE)
        self._flush()
        return self._at
