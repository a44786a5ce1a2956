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

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.publish import published_file
from curation.index import SCHEMA, IndexInfo, index_path, read_index_info, write_index
from curation.order import TAR, read_rows
from curation.pieces import Piece, PieceWriter, SourceTar, SourceTars
from curation.shards import BLOCK
from curation.spans import LocalReader

IntArray = npt.NDArray[np.int64]

_END_OF_ARCHIVE = bytes(2 * BLOCK)


@dataclass(frozen=True)
class Segment:
    """Some samples of a block: one batch of its order. `start`: position in the output."""

    block: Path
    batch: int
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
    with published_file(task.path) as file, PieceWriter(file) as writer:
        for segment in task.segments:
            rows = read_rows(segment.block, segment.batch)
            rows = _rename(rows, _renamed_rows(task, segment, rows.num_rows))
            layout = _lay_out(rows, writer.num_bytes)
            with SourceTars(segment.tars) as tars:
                writer.copy(tars, layout.pieces())
            tables.append(layout.index)
        writer.append(_END_OF_ARCHIVE)
        num_bytes = writer.finish()
    table = pa.concat_tables(tables)
    info = IndexInfo(
        source=task.source,
        shard=task.path.name,
        num_bytes=num_bytes,
        num_samples=table.num_rows,
        plan=task.plan,
        digest=writer.digest(),
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


@dataclass(frozen=True)
class _Layout:
    """Where the samples of a segment come from, and their index in the new shard."""

    index: pa.Table
    tars: IntArray  # of each piece
    starts: IntArray
    ends: IntArray
    headers: dict[int, bytes]  # of the pieces that get a new one

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces in the order of the new shard."""
        columns = (self.tars.tolist(), self.starts.tolist(), self.ends.tolist())
        headers = [b""] * len(self.tars)
        for number, header in self.headers.items():
            headers[number] = header
        return map(Piece, *columns, headers)


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
