"""Look-ahead over a tar for the walk along its headers (shards.py).

`Skipping` reads what lies near headers and passes over pictures; `Chunks` reads everything, the
next chunk while this one is worked on: for remote storage, for gzips, and where a scan wants the
pictures too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from curation.spans import WINDOW_BYTES, LocalReader, SpanReader

CHUNK_BYTES = 4 << 20
# Of one member in memory. What is larger is passed over.
MAX_MEMBER_BYTES = 256 << 20
# Where a member takes no more than this on average, reading all costs less than skipping.
_DENSE_BYTES = 4 << 10
_DENSE_WINDOW_BYTES = 256 << 10


_spare: list[bytearray] = []


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

    def skip_to(self, at: int, num_more: int) -> bytes:
        """Return what lies at the byte `at`; `num_more` headers were found since the last count.

        Raises:
            NotImplementedError: these windows follow each other.
        """
        raise NotImplementedError

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
    """Windows of a local file that pass over what is large."""

    is_whole = False

    def window(self, at: int, size: int) -> Window:
        """Return what lies at the byte `at` and behind it."""
        data = self.skip_to(at, 0)
        self._current, self._start = Window(data, 0, len(data)), at
        return self._current

    def skip_to(self, at: int, num_more: int) -> bytes:
        """Return what lies at the byte `at`; `num_more` headers were found since the last count."""
        is_dense = at < (self.num_headers + num_more) * _DENSE_BYTES
        return self._reader.fetch(at, _DENSE_WINDOW_BYTES if is_dense else WINDOW_BYTES)


class Chunks(Windows):
    """Windows that follow each other over a whole tar; the next is read while one is in use.

    Each of two buffers has room in front of its chunk for what the one before left over, so that a
    member that crosses an edge is in one piece.
    """

    is_whole = True

    def __init__(self, reader: SpanReader) -> None:
        super().__init__(reader)
        # Fresh memory costs as much as reading into it, so buffers go from tar to tar.
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
