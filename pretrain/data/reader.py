"""Samples by (shard, row): byte ranges from the index, read by `pread`.

No memory maps: on shared storage a truncated file must be an error, not a bus fault. Sizes are
checked when a shard is opened. Of each index only the columns that training needs are kept, in
Arrow's own buffers, and only of the shards that the current windows touch: a worker reads few of
the rows of each, so nothing is made of a row before it is read. A remote shard is read from its
copy in the cache, or by ranged requests where the cache has no room.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import DataError
from curation.manifest import index_info, index_path, read_index
from pretrain.data.dataset import Source
from pretrain.data.remote import Cache, FetchAhead, RemoteFiles, is_remote

_COLUMNS = ["key", "caption", "captions", "image_offset", "image_size", "problem"]
_MEMBER_COLUMNS = ["member_ext", "member_offset", "member_size"]
_MAX_SAMPLE_BYTES = 1 << 28  # of one member: nothing makes a worker take unbounded memory
_TRIES = 4  # of a read that shared storage refuses (EIO, ESTALE, ETIMEDOUT)
_NO_MEMBERS: Mapping[str, bytes] = MappingProxyType({})


class RawSample(NamedTuple):
    """A sample as it stands in its shard; `key` names it in messages as `shard:key`.

    `captions` are those of the index; `member` holds the extra members asked for, by extension.
    """

    key: str
    captions: list[str]
    image: bytes
    member: Mapping[str, bytes]


class UnusableSampleError(Exception):
    """A sample that cannot be trained on: which, what kind of problem (a fixed text), and why.

    It is replaced and counted, never fatal.
    """

    def __init__(self, key: str, kind: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.kind = kind
        self.problem = problem


@dataclass
class _Members:
    """The members of every row: extensions, offsets and sizes, row i at [first[i], first[i+1])."""

    first: npt.NDArray[np.int32]
    extension: Any
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]

    def ranges(self, row: int, wanted: Collection[str]) -> dict[str, tuple[int, int]]:
        found = {}
        for i in range(int(self.first[row]), int(self.first[row + 1])):
            extension = self.extension[i].as_py()
            if extension in wanted:
                found[extension] = (int(self.offset[i]), int(self.size[i]))
        return found


class _Texts:
    """A column of texts; `texts[row]` makes one str of Arrow's buffers, without a scalar of
    Arrow's in between. `missing`: the rows that are null.
    """

    def __init__(self, array: Any) -> None:
        _, offsets, data = array.buffers()
        self.missing = frozenset(np.flatnonzero(array.is_null()).tolist()) if len(array) else ()
        self._data = memoryview(data or b"")
        self._offsets = (
            memoryview(offsets).cast("i")[array.offset :] if offsets else memoryview(b"")
        )

    def __getitem__(self, row: int) -> str:
        offsets = self._offsets
        return str(self._data[offsets[row] : offsets[row + 1]], "utf-8")


@dataclass
class _OpenShard:
    """One index's columns; numbers as memory views, whose elements are read fastest."""

    location: str
    name: str
    descriptor: int | None  # None: by ranged requests
    key: _Texts
    caption: _Texts
    captions: Any  # None where every sample has one caption only
    problem: dict[int, str]  # row -> problem
    offset: memoryview
    size: memoryview  # -1: no image
    members: _Members | None


class ShardReader:
    """Reads samples of one source; keeps at most `max_open_shards` shards open.

    `extensions` are the members that `read` returns beside the image; `captionless` says that the
    captions come from them, so that a sample without one in the index is none the worse.
    """

    def __init__(
        self,
        source: Source,
        *,
        max_open_shards: int,
        cache: Cache | None = None,
        fetch_ahead: FetchAhead | None = None,
        extensions: Collection[str] = (),
        captionless: bool = False,
    ) -> None:
        self._source = source
        self._max_open_shards = max_open_shards
        self._cache = cache
        self._fetch_ahead = fetch_ahead
        self._extensions = frozenset(extensions)
        self._columns = _COLUMNS + (_MEMBER_COLUMNS if extensions else [])
        self._ignored = frozenset({"no caption"} if captionless else ())
        self._open: dict[int, _OpenShard] = {}

    def read(self, shard: int, row: int) -> RawSample:
        """Return the sample in `row` of shard number `shard`.

        Raises:
            UnusableSampleError: the index says that this sample cannot be read.
            DataError: the shard is missing, cut, or not what the manifest says.
        """
        opened = self._open.get(shard) or self._shard(shard)
        name = f"{opened.name}:{opened.key[row]}"
        if row in opened.problem and opened.problem[row] not in self._ignored:
            problem = opened.problem[row]
            raise UnusableSampleError(name, problem.partition(":")[0], problem)
        size = opened.size[row]
        if size < 0:
            raise UnusableSampleError(name, "no image", "no image")
        image = self._bytes(opened, name, opened.offset[row], size)
        member = _NO_MEMBERS
        if opened.members is not None:
            spans = opened.members.ranges(row, self._extensions)
            member = {ext: self._bytes(opened, name, *span) for ext, span in spans.items()}
        if opened.captions is not None or row in opened.caption.missing:
            return RawSample(name, _captions(opened, row), image, member)
        return RawSample(name, [opened.caption[row]], image, member)

    def retain(self, shards: Iterable[int]) -> None:
        """Close the shards that are not among `shards`: their windows are over."""
        for shard in self._open.keys() - set(map(int, shards)):
            self._close(self._open.pop(shard))

    def expect(self, now: Iterable[int], soon: Iterable[int]) -> None:
        """Have the shards that are read from `now` on kept in the cache, and those of `soon` too.

        Nothing happens for a source on disk.
        """
        if self._cache is None or self._fetch_ahead is None:
            return
        urls = [(shard, self._source.location(int(shard))) for shard in (*now, *soon)]
        remote = [(int(shard), url) for shard, url in urls if is_remote(url)]
        sizes = self._source.manifest.table["num_bytes"]
        for _, url in remote:
            self._cache.touch(url)
        # Every process starts elsewhere in the list, so that they share the work.
        start = os.getpid() % max(1, len(remote))
        files: list[tuple[str, int | None]] = []
        for shard, url in remote[start:] + remote[:start]:
            files += [(str_index_path(url), None), (url, sizes[shard].as_py())]
        self._fetch_ahead.ask(files)

    def close(self) -> None:
        """Close every open shard."""
        self.retain(())

    def _close(self, opened: _OpenShard) -> None:
        if opened.descriptor is not None:
            os.close(opened.descriptor)

    def _bytes(self, opened: _OpenShard, name: str, offset: int, size: int) -> bytes:
        if size > _MAX_SAMPLE_BYTES:
            raise UnusableSampleError(
                name, "too many bytes", f"{size:,} bytes are more than {_MAX_SAMPLE_BYTES:,}"
            )
        if opened.descriptor is None:
            assert self._cache is not None
            return self._cache.files.read(opened.location, offset, size)
        data = _pread(opened.descriptor, size, offset, opened.location)
        if len(data) != size:
            raise DataError(
                f"{opened.location}: got {len(data)} of the {size} bytes of sample {name!r}; the "
                "file was cut after it was opened."
            )
        return data

    def _shard(self, shard: int) -> _OpenShard:
        """Open a shard; where too many are open, the one opened first is closed."""
        while len(self._open) >= self._max_open_shards:
            self._close(self._open.pop(next(iter(self._open))))
        location = self._source.location(shard)
        expected = self._source.manifest.table.slice(shard, 1).to_pylist()[0]
        open_shard = self._open_remote if is_remote(location) else self._open_local
        descriptor, table = open_shard(location, expected["num_bytes"])
        if table.num_rows != expected["num_samples"]:
            raise DataError(
                f"{location}: its index has {table.num_rows} samples, the manifest says "
                f"{expected['num_samples']}. Delete the index and run `pairmill index` on the "
                "folder."
            )
        self._open[shard] = opened = _with_columns(location, descriptor, table)
        return opened

    def _open_local(self, location: str, num_bytes: int) -> tuple[int | None, pa.Table]:
        try:
            descriptor = os.open(location, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"{location}: cannot be opened ({error.strerror}); the manifest names it. "
                "Restore it, or run `pairmill curate` again: it writes what is missing."
            ) from None
        size = os.fstat(descriptor).st_size
        if size != num_bytes:
            os.close(descriptor)
            raise DataError(
                f"{location}: has {size:,} bytes, the manifest says {num_bytes:,}; it was cut or "
                "changed since. Restore it, or delete it and run `pairmill curate` again."
            )
        return descriptor, _local_index(Path(location), self._columns)

    def _open_remote(self, location: str, num_bytes: int) -> tuple[int | None, pa.Table]:
        assert self._cache is not None
        url = str_index_path(location)
        copy = self._cache.open(url)
        if copy is not None:
            with open(copy, "rb") as file:
                content = file.read()
        else:
            content = self._cache.files.read(url, 0, self._cache.files.size(url))
        table = _remote_index(url, content, self._columns)
        return self._cache.open(location, num_bytes), table


def _local_index(tar: Path, columns: list[str]) -> pa.Table:
    table = _index_columns(index_path(tar), columns)
    return read_index(tar, columns) if table is None else table  # read_index says what is wrong


def _remote_index(url: str, content: bytes, columns: list[str]) -> pa.Table:
    table = _index_columns(pa.BufferReader(content), columns)
    if table is None:
        raise DataError(
            f"{url} is not an index that this version of pairmill reads. Make it anew with "
            "`pairmill index` where the tars were written, and copy it again."
        )
    return table


def _index_columns(file: Any, columns: list[str]) -> pa.Table | None:
    """Return columns of an index; None: it cannot be read, lacks some, or is of another version.

    Without the threads and the dataset machinery of `read_index`, which cost more than the reading.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            if index_info(schema) is None or not set(schema.names).issuperset(columns):
                return None
            return parquet.read(columns, use_threads=False)
    except (OSError, pa.ArrowException):
        return None


def captions_of(source: Source, shard: int) -> list[str]:
    """Return the index's captions of a shard's usable samples, the first of each."""
    location = source.location(shard)
    columns = ["caption", "problem"]
    if is_remote(location):
        files = RemoteFiles(retries=8)
        url = str_index_path(location)
        content = files.read(url, 0, files.size(url))
        table = _remote_index(url, content, columns)
    else:
        table = read_index(location, columns)
    usable = table.filter(pc.is_null(table["problem"]))["caption"].drop_null()
    captions: list[str] = usable.to_pylist()
    return captions


def str_index_path(url: str) -> str:
    """Return the URL of the index beside a remote tar."""
    return f"{url.rpartition('/')[0]}/{index_path(url.rpartition('/')[2])}"


def _with_columns(location: str, descriptor: int | None, table: pa.Table) -> _OpenShard:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    members = None
    if "member_ext" in columns:
        lists = [columns[name] for name in _MEMBER_COLUMNS]
        members = _Members(
            lists[0].offsets.to_numpy(),
            lists[0].values,
            lists[1].values.to_numpy(),
            lists[2].values.to_numpy(),
        )
    several, size = columns["captions"], columns["image_size"]
    unusable = np.flatnonzero(columns["problem"].is_valid())
    problems = columns["problem"].take(pa.array(unusable)).to_pylist()
    return _OpenShard(
        location=location,
        name=location.rpartition("/")[2],
        descriptor=descriptor,
        key=_Texts(columns["key"]),
        caption=_Texts(columns["caption"]),
        captions=None if several.null_count == len(several) else several,
        problem=dict(zip(unusable.tolist(), problems, strict=True)),
        offset=_numbers(columns["image_offset"]),
        size=_numbers(pc.if_else(columns["image_offset"].is_valid(), size, -1)),
        members=members,
    )


def _numbers(column: Any) -> memoryview:
    numbers: Any = np.ascontiguousarray(column.fill_null(-1).to_numpy(), dtype=np.int64)
    return memoryview(numbers)


def _captions(opened: _OpenShard, row: int) -> list[str]:
    several = None if opened.captions is None else opened.captions[row].as_py()
    if several:
        return [text for text in several if text is not None]
    return [] if row in opened.caption.missing else [opened.caption[row]]


def _pread(descriptor: int, size: int, offset: int, location: str) -> bytes:
    parts: list[bytes] = []
    missing, failures = size, 0
    while missing:
        try:
            data = os.pread(descriptor, missing, offset + size - missing)
            if len(data) == size:
                return data
        except OSError as error:
            failures += 1
            if failures == _TRIES:
                raise DataError(
                    f"{location}: cannot be read at byte {offset:,} ({error.strerror}), "
                    f"{_TRIES} times in a row. Check the storage."
                ) from None
            time.sleep(0.1 * 4**failures)
            continue
        if not data:
            break
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)
