"""Make one output shard: copy the raw spans of its samples; index and digest are made as written.

No member is decoded or packed anew: header blocks and data go over as they are, so that the images
are the very bytes that came in. Only a sample whose key came before in the output gets new
headers.
"""

from __future__ import annotations

import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from configs.errors import DataError
from configs.publish import published_file
from curation.index import SCHEMA, IndexInfo, index_path, read_index_info, write_index
from curation.order import TAR
from curation.shards import BLOCK
from curation.spans import LocalReader, RemoteReader, SpanReader, open_tar

IntArray = npt.NDArray[np.int64]

_END_OF_ARCHIVE = bytes(2 * BLOCK)
_CHUNK_BYTES = 4 << 20
_MAX_OPEN_TARS = 400
# (path, fingerprint) -> state of the file when its fingerprint was found to be that one.
_known_good: dict[tuple[str, str], object] = {}


@dataclass(frozen=True)
class SourceTar:
    """A tar to copy from, as it was when it was scanned."""

    path: str
    num_bytes: int
    fingerprint: str
    storage: tuple[tuple[str, Any], ...] = ()  # options of the URL's file system


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
    info = made_before(task)
    if info is None:
        index = index_path(task.path)
        index.unlink(missing_ok=True)  # so that an index always belongs to the tar beside it
        info = _copy(task, index)
    assert info.digest is not None
    return Copied(num_samples=info.num_samples, num_bytes=info.num_bytes, digest=info.digest)


def made_before(task: CopyTask) -> IndexInfo | None:
    """Return what the index says of a shard that this plan has made; None: it is still to do."""
    info = read_index_info(index_path(task.path))
    is_good = info and info.plan == task.plan and _fingerprint(task.path) == info.fingerprint
    return info if is_good else None


def _fingerprint(path: Path) -> str | None:
    """Return the fingerprint of a tar; None where there is none."""
    if not path.is_file():
        return None
    with LocalReader(path) as reader:
        return reader.fingerprint()


def _copy(task: CopyTask, index: Path) -> IndexInfo:
    tables = []
    with published_file(task.path) as file:
        writer = _Writer(file)
        for segment in task.segments:
            with pq.ParquetFile(segment.block) as block:
                rows = block.read_row_group(segment.row_group)
            rows = _rename(rows.combine_chunks(), _renamed_rows(task, segment, rows.num_rows))
            layout = _lay_out(rows, writer.num_bytes)
            with _Tars(segment.tars) as tars:
                writer.copy(tars, layout.pieces())
            tables.append(layout.index)
        num_bytes = writer.finish()
    table = pa.concat_tables(tables)
    info = IndexInfo(
        source=task.source,
        shard=task.path.name,
        num_bytes=num_bytes,
        num_samples=table.num_rows,
        plan=task.plan,
        digest=f"xxh3-128:{writer.hasher.hexdigest()}",
        fingerprint=_fingerprint(task.path),
    )
    return write_index(index, table.combine_chunks(), info)


def _renamed_rows(task: CopyTask, segment: Segment, num_rows: int) -> IntArray:
    """Return the rows of a segment whose samples get a new key."""
    found = [np.zeros(0, np.int64)]
    for path in task.renames:
        positions = np.load(path, allow_pickle=False, mmap_mode="r")
        low, high = np.searchsorted(positions, [segment.start, segment.start + num_rows])
        found.append(positions[low:high].astype(np.int64) - segment.start)
    return np.sort(np.concatenate(found))


_RENAMED = "renamed"


def _rename(rows: pa.Table, renamed: IntArray) -> pa.Table:
    """Give the samples in the rows `renamed` new keys; mark them in a column."""
    mask = np.zeros(rows.num_rows, bool)
    mask[renamed] = True
    rows = rows.append_column(_RENAMED, pa.array(mask))
    if not len(renamed):
        return rows
    keys, uids = rows["key"].to_pylist(), rows["uid"]
    for row in renamed.tolist():
        keys[row] = f"{keys[row]}-{uids[row].as_py().hex()[:8]}"
    at = rows.column_names.index("key")
    return rows.set_column(at, "key", pa.array(keys, pa.large_string()))


class _Piece(NamedTuple):
    """Bytes [start, end) of a tar of the block, behind a new header where there is one."""

    tar: int
    start: int
    end: int
    header: bytes


@dataclass(frozen=True)
class _Layout:
    """Where the samples of a segment come from, and their index in the new shard."""

    index: pa.Table
    tars: IntArray  # of each piece
    starts: IntArray
    ends: IntArray
    headers: dict[int, bytes]  # of the pieces that get a new one

    def pieces(self) -> Iterator[_Piece]:
        """Yield the pieces in the order of the new shard."""
        columns = (self.tars.tolist(), self.starts.tolist(), self.ends.tolist())
        for number, (tar, start, end) in enumerate(zip(*columns, strict=True)):
            yield _Piece(tar, start, end, self.headers.get(number, b""))


def _lay_out(rows: pa.Table, at: int) -> _Layout:
    """Plan the copy of some samples to the byte `at` of a new shard and behind it.

    Members that follow each other in the source go over in one piece, their headers with them.
    """
    listed = rows["member_start"].combine_chunks()
    counts = listed.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    row_of = np.repeat(np.arange(rows.num_rows), counts)
    firsts = np.cumsum(counts) - counts
    starts, offsets, sizes = (
        rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for name in ("member_start", "member_offset", "member_size")
    )
    is_renamed = rows[_RENAMED].to_numpy()[row_of]
    headers = _new_headers(rows, row_of, np.flatnonzero(is_renamed), sizes)
    header_bytes = np.zeros(len(starts), np.int64)
    for member, header in headers.items():
        header_bytes[member] = len(header)
    begins = np.where(is_renamed, offsets, starts)
    ends = offsets + (sizes + BLOCK - 1) // BLOCK * BLOCK
    lengths = header_bytes + ends - begins
    new_starts = at + np.cumsum(lengths) - lengths
    new_offsets = new_starts + header_bytes + (offsets - begins)
    is_first = is_renamed.copy()
    is_first[firsts] = True
    is_first[1:] |= begins[1:] != ends[:-1]
    piece = np.flatnonzero(is_first)
    last = np.append(piece[1:], len(starts)) - 1
    image = np.flatnonzero(offsets == rows["image_offset"].to_numpy()[row_of])
    columns = {
        "image_offset": pa.array(new_offsets[image]),
        "member_start": pa.ListArray.from_arrays(listed.offsets, pa.array(new_starts)),
        "member_offset": pa.ListArray.from_arrays(listed.offsets, pa.array(new_offsets)),
    }
    index = pa.table(
        [columns.get(name, rows[name]) for name in SCHEMA.names], names=SCHEMA.names
    ).cast(SCHEMA)
    numbers = {member: number for number, member in enumerate(piece.tolist())}
    return _Layout(
        index=index,
        tars=rows[TAR].to_numpy()[row_of[piece]],
        starts=begins[piece],
        ends=ends[last],
        headers={numbers[member]: header for member, header in headers.items()},
    )


def _new_headers(
    rows: pa.Table, row_of: IntArray, members: IntArray, sizes: IntArray
) -> dict[int, bytes]:
    """Return headers with the samples' new keys for some members, by number."""
    if not len(members):
        return {}
    extensions = rows["member_ext"].combine_chunks().flatten()
    headers = {}
    for member in members.tolist():
        key = rows["key"][int(row_of[member])].as_py()
        header = tarfile.TarInfo(f"{key}.{extensions[member].as_py()}")
        header.size = int(sizes[member])
        headers[member] = header.tobuf(tarfile.GNU_FORMAT, "utf-8")
    return headers


class _Tars:
    """The source tars of a block, opened when first needed; so many at once and no more."""

    def __init__(self, tars: tuple[SourceTar, ...]) -> None:
        self._tars = tars
        self._readers: OrderedDict[int, SpanReader] = OrderedDict()

    def __enter__(self) -> _Tars:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def reader(self, number: int) -> SpanReader:
        """Return the reader of a tar, which is the one that was scanned."""
        reader = self._readers.get(number)
        if reader is not None:
            self._readers.move_to_end(number)
            return reader
        if len(self._readers) >= _MAX_OPEN_TARS:
            self._readers.popitem(last=False)[1].close()
        tar = self._tars[number]
        reader = open_tar(tar.path, dict(tar.storage))
        name, state = (tar.path, tar.fingerprint), reader.state()
        if _known_good.get(name) != state or state is None:
            if reader.num_bytes != tar.num_bytes or reader.fingerprint() != tar.fingerprint:
                reader.close()
                raise DataError(
                    f"{tar.path} is not the tar that was scanned ({tar.num_bytes:,} bytes then, "
                    f"{reader.num_bytes:,} now): it changed since. Restore it, or run the same "
                    "line again with all stages."
                )
            _known_good[name] = state
        self._readers[number] = reader
        return reader


class _Writer:
    """Gathers pieces in a buffer; hashes and writes it whenever it is full."""

    def __init__(self, file: IO[bytes]) -> None:
        self.hasher = xxhash.xxh3_128()
        self.num_bytes = 0
        self._file = file
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._filled = 0

    def copy(self, tars: _Tars, pieces: Iterable[_Piece]) -> None:
        """Append pieces."""
        ahead: list[tuple[RemoteReader, _Piece]] = []
        num_ahead = 0
        for piece in pieces:
            reader = tars.reader(piece.tar)
            if isinstance(reader, RemoteReader):  # many requests at once
                ahead.append((reader, piece))
                num_ahead += piece.end - piece.start
                if num_ahead >= 2 * _CHUNK_BYTES or len(ahead) >= _MAX_OPEN_TARS // 2:
                    self._copy_remote(ahead)
                    ahead, num_ahead = [], 0
                continue
            assert isinstance(reader, LocalReader)
            if piece.header:
                self.append(piece.header)
            self._copy_local(reader, piece.start, piece.end)
        self._copy_remote(ahead)

    def _copy_local(self, reader: LocalReader, start: int, end: int) -> None:
        while start < end:
            room = self._buffer[self._filled : self._filled + end - start]
            got = reader.fetch_into(room, start)
            if got == 0:
                self.append(_lost_padding(reader, start, end))
                return
            self._filled += got
            self.num_bytes += got
            start += got
            if self._filled == _CHUNK_BYTES:
                self._flush()

    def _copy_remote(self, pieces: list[tuple[RemoteReader, _Piece]]) -> None:
        spans = [(reader, piece.start, piece.end) for reader, piece in pieces]
        for (reader, piece), data in zip(pieces, RemoteReader.fetch_many(spans), strict=True):
            self.append(piece.header)
            self.append(data)
            start = piece.start + len(data)
            if start < piece.end:
                self.append(_lost_padding(reader, start, piece.end))

    def append(self, data: bytes) -> None:
        """Append bytes."""
        at = 0
        while at < len(data):
            part = data[at : at + _CHUNK_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.num_bytes += len(part)
            at += len(part)
            if self._filled == _CHUNK_BYTES:
                self._flush()

    def _flush(self) -> None:
        filled = self._buffer[: self._filled]
        self.hasher.update(filled)
        self._file.write(filled)
        self._filled = 0

    def finish(self) -> int:
        """Write the end-of-archive blocks; return the size of the tar in bytes."""
        self.append(_END_OF_ARCHIVE)
        self._flush()
        return self.num_bytes


def _lost_padding(reader: SpanReader, start: int, end: int) -> bytes:
    """Return what is missing at the end of a tar: padding of the last member, nothing else."""
    if start < reader.num_bytes or end - reader.num_bytes >= BLOCK:
        raise DataError(f"a shard shrank while it was copied (at byte {start}).")
    return bytes(end - start)
