"""Copy pieces of many tars to one file as fast as `cp` does, hashed on the way.

Three things go on at once: the disk reads the pieces that come next, this process copies and
hashes the ones that are there, and the disk writes what was copied (which has to be on it before
the file is renamed). The buffer is small enough to stay in a core's own cache.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import xxhash

from configs.errors import DataError
from curation.shards import BLOCK
from curation.spans import LocalReader, RemoteReader, SpanReader, open_tar

_CHUNK_BYTES = 1 << 20
# What is announced to the disk, or asked of remote storage, at once.
_BATCH_BYTES = 8 << 20
_MAX_OPEN_TARS = 400
# What the disk gets to write while the next bytes are copied.
_FLUSH_BYTES = 16 << 20
# (path, fingerprint) -> state of the file when its fingerprint was found to be that one.
_known_good: dict[tuple[str, str], object] = {}


@dataclass(frozen=True)
class SourceTar:
    """A tar to copy from, as it was when it was scanned."""

    path: str
    num_bytes: int
    fingerprint: str
    storage: tuple[tuple[str, Any], ...] = ()  # options of the URL's file system


class Piece(NamedTuple):
    """Bytes [start, end) of a tar of the block, behind a new header where there is one."""

    tar: int
    start: int
    end: int
    header: bytes


class SourceTars:
    """The source tars of a block, opened when first needed; so many at once and no more."""

    def __init__(self, tars: tuple[SourceTar, ...]) -> None:
        self._tars = tars
        self._readers: OrderedDict[int, SpanReader] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def reader(self, number: int) -> SpanReader:
        """Return the reader of a tar, which is the one that was scanned.

        It stays open until `_MAX_OPEN_TARS` others were asked for.
        """
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


_Batch = list[tuple[SpanReader, Piece]]


def _batches(tars: SourceTars, pieces: Iterable[Piece]) -> Iterator[_Batch]:
    """Yield the pieces with their readers, some MiB at once; the disk is told of local ones.

    Two batches after each other have no more readers than may be open.
    """
    batch: _Batch = []
    num_bytes = 0
    for piece in pieces:
        reader = tars.reader(piece.tar)
        batch.append((reader, piece))
        size = piece.end - piece.start
        num_bytes += size
        if isinstance(reader, LocalReader):
            reader.will_need(piece.start, min(size, _BATCH_BYTES))
        if num_bytes >= _BATCH_BYTES or len(batch) >= _MAX_OPEN_TARS // 2:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class PieceWriter:
    """Appends to a file what is copied to it; `finish` before the file is closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._hasher = xxhash.xxh3_128()
        self._file = file
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._num_written = self._filled = 0
        self._disk = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._num_unflushed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._disk.shutdown()  # the file must not be closed before

    @property
    def num_bytes(self) -> int:
        """The size of the file so far."""
        return self._num_written + self._filled

    def copy(self, tars: SourceTars, pieces: Iterable[Piece]) -> None:
        """Append pieces."""
        batches = _batches(tars, pieces)
        batch = next(batches, None)
        while batch:
            following = next(batches, None)  # the disk reads it while this one is copied
            self._copy_batch(batch)
            batch = following

    def _copy_batch(self, batch: _Batch) -> None:
        # A reader is mostly a local one, which is told at once; to be no remote one takes longer.
        others = [(r, p) for r, p in batch if not isinstance(r, LocalReader)]
        spans = [(r, p.start, p.end) for r, p in others if isinstance(r, RemoteReader)]
        fetched = iter(RemoteReader.fetch_many(spans))  # many requests at once
        for reader, piece in batch:
            if piece.header:
                self.append(piece.header)
            if isinstance(reader, LocalReader):
                self._copy_local(reader, piece.start, piece.end)
                continue
            data = next(fetched)
            self.append(data)
            if piece.start + len(data) < piece.end:
                self.append(_lost_padding(reader, piece.start + len(data), piece.end))

    def _copy_local(self, reader: LocalReader, start: int, end: int) -> None:
        while start < end:
            room = self._buffer[self._filled : self._filled + end - start]
            got = reader.fetch_into(room, start)
            if got == 0:
                self.append(_lost_padding(reader, start, end))
                return
            self._filled += got
            start += got
            if self._filled == _CHUNK_BYTES:
                self._write()

    def append(self, data: bytes) -> None:
        """Append bytes."""
        at = 0
        while at < len(data):
            part = data[at : at + _CHUNK_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            at += len(part)
            if self._filled == _CHUNK_BYTES:
                self._write()

    def _write(self) -> None:
        filled = self._buffer[: self._filled]
        self._hasher.update(filled)
        self._file.write(filled)
        self._num_written += self._filled
        self._num_unflushed += self._filled
        self._filled = 0
        if self._num_unflushed >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Have the disk write what it was given, unless it still does."""
        if self._flushing is not None:
            if not self._flushing.done():
                return
            self._flushing.result()  # an error is told once: a later fsync would say all is well
        self._file.flush()
        self._flushing = self._disk.submit(os.fsync, self._file.fileno())
        self._num_unflushed = 0

    def finish(self) -> int:
        """Write what is left in the buffer; return the size of the file in bytes."""
        self._write()
        if self._flushing is not None:
            self._flushing.result()
        return self.num_bytes

    def digest(self) -> str:
        """Return the digest of all that was written."""
        return f"xxh3-128:{self._hasher.hexdigest()}"


def _lost_padding(reader: SpanReader, start: int, end: int) -> bytes:
    """Return what is missing at the end of a tar: padding of the last member, nothing else."""
    if start < reader.num_bytes or end - reader.num_bytes >= BLOCK:
        raise DataError(f"a shard shrank while it was copied (at byte {start}).")
    return bytes(end - start)
