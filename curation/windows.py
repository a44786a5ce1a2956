"""Look-ahead over a tar for the walk along its headers (shards.py).

`Skipping` reads what lies near headers and passes over pictures; `Chunks` reads everything, the
next chunk while this one is worked on: for remote storage, for gzips, and where a scan decodes the
pictures too. `Hashing` does where it wants no more of them than their hashes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import xxhash

from curation.spans import LocalReader, SpanReader

CHUNK_BYTES = 4 << 20
# Of one member in memory. What is larger is passed over.
MAX_MEMBER_BYTES = 256 << 20
# Where a member takes no more than this on average, reading all costs less than skipping.
_DENSE_BYTES = 4 << 10
_DENSE_WINDOW_BYTES = 256 << 10


# Fresh memory costs as much as reading into it, so buffers go from tar to tar.
_spare: list[bytearray] = []
_spare_batches: list[bytearray] = []
# Of most tars this brings the header of a sample's JSON, its text, and the start of its picture.
_NEAR_BYTES = 4096
_PIECE_BYTES = 512 << 10
# What `Skipping` gathers of a tar before it is worked on, and the room for one window more.
BATCH_BYTES = 4 << 20
_BATCH_ROOM = BATCH_BYTES + 2 * _DENSE_WINDOW_BYTES


class Window(NamedTuple):
    """Some bytes of a tar: `data[position:end]` begin at the byte that was asked for."""

    data: bytes | bytearray
    position: int
    end: int


class Windows(ABC):
    """Hands out windows over one tar, and reads from the current one what lies in it."""

    is_whole: bool  # everything is read, and members are in one piece
    num_headers = 0  # found so far

    def __init__(self, reader: SpanReader) -> None:
        self._reader = reader
        self._current = Window(b"", 0, 0)
        self._start = 0

    @property
    def _end(self) -> int:
        return self._start + self._current.end - self._current.position

    @abstractmethod
    def window(self, at: int, size: int) -> Window:
        """Return what lies at the byte `at` and behind it, `size` bytes at least where they are."""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer only at the end of the tar."""
        data, position, _ = self._current
        if self._start <= offset and offset + size <= self._end:
            at = position + offset - self._start
            return bytes(data[at : at + size])
        return self._reader.read(offset, size)

    def reaches(self, position: int) -> bool:
        """Tell whether the tar has `position` bytes and more."""
        return position <= self._end or self._reader.reaches(position)

    def close(self) -> None:  # noqa: B027
        """Wait for what is under way."""


class Skipping(Windows):
    """Windows of a local file that pass over what is large; they stand in one buffer.

    `data[:num_bytes]` is what was read since `clear`. The buffer is used again after that.
    """

    is_whole = False

    def __init__(self, reader: LocalReader) -> None:
        super().__init__(reader)
        self.data = _spare_batches.pop() if _spare_batches else bytearray(_BATCH_ROOM)
        self.num_bytes = 0
        self._view = memoryview(self.data)
        self._descriptor = reader.descriptor
        self.near_bytes = _NEAR_BYTES  # whoever finds that too little may make it WINDOW_BYTES

    def clear(self) -> None:
        """Begin anew: nothing of the buffer is wanted any more."""
        self.num_bytes = 0
        self._current = Window(b"", 0, 0)

    def window(self, at: int, size: int) -> Window:
        """Return what lies at the byte `at` and behind it."""
        begin, end = self.append(at, 0)
        self._current, self._start = Window(self.data, begin, end), at
        return self._current

    def append(self, at: int, num_more: int) -> tuple[int, int]:
        """Read what lies at the byte `at`; return where in the buffer it begins and ends.

        `num_more` headers were found since they were counted last.
        """
        is_dense = at < (self.num_headers + num_more) * _DENSE_BYTES
        begin, size = self.num_bytes, _DENSE_WINDOW_BYTES if is_dense else self.near_bytes
        got = self._fill(self._view[begin : begin + size], at)
        # The next one begins on a block as well, as headers do.
        self.num_bytes = begin + (got + 511 & -512)
        return begin, begin + got

    def _fill(self, room: memoryview, at: int) -> int:
        got = os.preadv(self._descriptor, [room], at)
        while got < len(room) and (more := os.preadv(self._descriptor, [room[got:]], at + got)):
            got += more
        return got

    def close(self) -> None:
        """Hand the buffer on."""
        self._view.release()
        if not _spare_batches:
            _spare_batches.append(self.data)


class Hashing(Skipping):
    """The same windows of a local file, all of which is read, and its members hashed on the way.

    What is read is small enough to stay in a core's own cache until it is hashed.
    """

    def __init__(self, reader: LocalReader) -> None:
        super().__init__(reader)
        self._piece = memoryview(bytearray(_PIECE_BYTES))
        self._piece_start = self._piece_end = 0  # in the tar

    def _fill(self, room: memoryview, at: int) -> int:
        start = self._advance(at, len(room))
        if start is None:
            return super()._fill(room, at)
        got = min(len(room), self._piece_end - at)
        room[:got] = self._piece[start : start + got]
        return got

    def _advance(self, at: int, size: int) -> int | None:
        """Have `size` bytes at the byte `at`, or all up to the end; return where in the piece.

        None: it is too small for that.
        """
        start, end = self._piece_start, self._piece_end
        if start <= at and at + size <= end:
            return at - start
        if size > _PIECE_BYTES:
            return None
        left = end - at if start <= at <= end else 0
        self._piece[:left] = self._piece[end - start - left : end - start]
        self._piece_start = at
        self._piece_end = at + left + super()._fill(self._piece[left:], at + left)
        return 0

    def digest(self, at: int, size: int) -> bytes | None:
        """Return the xxh3-128 of bytes of the tar; None: it ends before they do."""
        start = self._advance(at, size)
        if start is not None:
            is_whole = at + size <= self._piece_end
            return xxhash.xxh3_128_digest(self._piece[start : start + size]) if is_whole else None
        hasher = xxhash.xxh3_128()
        for begin in range(at, at + size, _PIECE_BYTES):
            length = min(_PIECE_BYTES, at + size - begin)
            start = self._advance(begin, length)
            if start is None or begin + length > self._piece_end:
                return None
            hasher.update(self._piece[start : start + length])
        found: bytes = hasher.digest()
        return found


class Chunks(Windows):
    """Windows that follow each other over a whole tar; the next is read while one is in use.

    Each of two buffers has room in front of its chunk for what the one before left over, so that a
    member that crosses an edge is in one piece.
    """

    is_whole = True

    def __init__(self, reader: SpanReader) -> None:
        super().__init__(reader)
        self._buffers = [_spare.pop() if _spare else bytearray(2 * CHUNK_BYTES) for _ in "ab"]
        # A gzip is one stream and cannot be read by two.
        self._thread = None if reader.is_gzip else ThreadPoolExecutor(1)
        self._ahead: Future[int] | None = None
        self._ahead_start = -1

    def window(self, at: int, size: int) -> Window:
        """Return what lies at the byte `at` and behind it."""
        left = self._end - at  # what of the last window is still wanted
        if not 0 <= left <= self._end - self._start or self._ahead_start != self._end:
            self._drop_ahead()
            left = 0
        last = self._current
        tail = memoryview(last.data)[last.end - left : last.end]
        buffer, filled = self._next(at + left)
        if left <= CHUNK_BYTES and (left + filled >= size or filled < CHUNK_BYTES):
            buffer[CHUNK_BYTES - left : CHUNK_BYTES] = tail
            window = Window(buffer, CHUNK_BYTES - left, CHUNK_BYTES + filled)
        else:
            more = size - left - filled
            behind = self._reader.fetch(at + left + filled, more) if more > 0 else b""
            data = b"".join((tail, memoryview(buffer)[CHUNK_BYTES : CHUNK_BYTES + filled], behind))
            window = Window(data, 0, len(data))
        tail.release()
        self._current, self._start = window, at
        self._buffers.reverse()
        self._ahead_start = self._end
        if self._thread is not None and filled == CHUNK_BYTES:
            self._ahead = self._thread.submit(self._fill, self._buffers[0], self._ahead_start)
        return window

    def _next(self, at: int) -> tuple[bytearray, int]:
        ahead, self._ahead = self._ahead, None
        buffer = self._buffers[0]
        return buffer, self._fill(buffer, at) if ahead is None else ahead.result()

    def _fill(self, buffer: bytearray, at: int) -> int:
        """Read a chunk into the back half of a buffer; return its size in bytes."""
        with memoryview(buffer)[CHUNK_BYTES:] as room:
            if isinstance(self._reader, LocalReader):
                filled = 0
                while filled < CHUNK_BYTES and (
                    more := self._reader.fetch_into(room[filled:], at + filled)
                ):
                    filled += more
                return filled
            data = self._reader.fetch(at, CHUNK_BYTES)
            room[: len(data)] = data
            return len(data)

    def _drop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()

    def close(self) -> None:
        """Wait for what is under way."""
        if self._thread is not None:
            self._thread.shutdown()
        if len(_spare) < 2:
            _spare.extend(self._buffers)
