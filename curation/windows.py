"""Look-ahead over a tar for the walk along its headers (shards.py).

`Skipping` reads what lies near headers and passes over pictures; `Chunks` reads everything, the
next chunk while this one is worked on: for remote storage, for gzips, and where a scan decodes the
pictures too. `Hashing` does where it wants no more of them than their hashes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curation.spans import LocalReader, SpanReader

Bytes = npt.NDArray[np.uint8]

_NO_BYTES = np.zeros(0, np.uint8)
CHUNK_BYTES = 4 << 20
# Of one member in memory. What is larger is passed over.
MAX_MEMBER_BYTES = 256 << 20
# Where a member takes no more than this on average, reading all costs less than skipping.
_DENSE_BYTES = 4 << 10
_DENSE_WINDOW_BYTES = 256 << 10


# Of most tars this brings the header of a sample's JSON, its text, and the start of its picture.
NEAR_BYTES = 4096
# Of a member alone: a text, or all of a usual JPEG before its picture begins.
HEAD_BYTES = 2048
_PIECE_BYTES = 1 << 20
# What the disk is asked for before it is wanted.
_AHEAD_BYTES = 16 << 20
# What is gathered of a tar before it is worked on, and the room for one window more.
BATCH_BYTES = 4 << 20
_BATCH_ROOM = BATCH_BYTES + _PIECE_BYTES + _DENSE_WINDOW_BYTES

# Fresh memory costs as much as reading into it, so buffers go from tar to tar.
_spare: list[Bytes] = []
_spare_batches: list[Bytes] = []
_spare_pieces: list[Bytes] = []


class Window(NamedTuple):
    """Some bytes of a tar: `data[position:end]` begin at the byte that was asked for."""

    data: Bytes
    position: int
    end: int


class Windows(ABC):
    """Hands out windows over one tar, and reads from the current one what lies in it."""

    is_whole: bool  # everything is read, and members are in one piece
    num_headers = 0  # found so far

    def __init__(self, reader: SpanReader) -> None:
        self._reader = reader
        self._current = Window(_NO_BYTES, 0, 0)
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
            return data[at : at + size].tobytes()
        return self._reader.read(offset, size)

    def reaches(self, position: int) -> bool:
        """Tell whether the tar has `position` bytes and more."""
        return position <= self._end or self._reader.reaches(position)

    def close(self) -> None:  # noqa: B027
        """Wait for what is under way."""


class Gathering:
    """A buffer for what lies near the headers of a batch: `data[:num_bytes]` since `clear`.

    It is used again after that, and goes from tar to tar.
    """

    def __init__(self) -> None:
        self.data = _spare_batches.pop() if _spare_batches else np.empty(_BATCH_ROOM, np.uint8)
        self.num_bytes = 0

    def clear(self) -> None:
        """Begin anew: nothing of the buffer is wanted any more."""
        self.num_bytes = 0

    def hand_on(self) -> None:
        """Leave the buffer to the next tar."""
        if len(_spare_batches) < 2:
            _spare_batches.append(self.data)


class Skipping(Windows):
    """Windows of a local file that pass over what is large; they stand in one buffer, `near`."""

    is_whole = False

    def __init__(self, reader: LocalReader) -> None:
        super().__init__(reader)
        self.near = Gathering()
        self.descriptor = reader.descriptor
        self._file = reader
        self.near_bytes = NEAR_BYTES  # whoever finds that too little may make it WINDOW_BYTES

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What kernels.skip_along wants to know of windows."""
        return self.near_bytes, _DENSE_WINDOW_BYTES, _DENSE_BYTES, BATCH_BYTES

    def window(self, at: int, size: int) -> Window:
        """Return what lies at the byte `at` and behind it."""
        near, begin = self.near, self.near.num_bytes
        is_dense = at < self.num_headers * _DENSE_BYTES
        num_bytes = _DENSE_WINDOW_BYTES if is_dense else self.near_bytes
        room = near.data.data[begin : begin + num_bytes]
        got = self._file.fetch_into(room, at)
        # The next one begins on a block as well, as headers do.
        near.num_bytes = begin + (got + 511 & -512)
        self._current, self._start = Window(near.data, begin, begin + got), at
        return self._current

    def close(self) -> None:
        """Hand the buffer on."""
        self.near.hand_on()


class Chunks(Windows):
    """Windows that follow each other over a whole tar; the next is read while one is in use.

    Each of two buffers has room in front of its chunk for what the one before left over, so that a
    member that crosses an edge is in one piece.
    """

    is_whole = True

    def __init__(self, reader: SpanReader) -> None:
        super().__init__(reader)
        self._buffers = [
            _spare.pop() if _spare else np.empty(2 * CHUNK_BYTES, np.uint8) for _ in "ab"
        ]
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
        tail = last.data[last.end - left : last.end]
        buffer, filled = self._next(at + left)
        if left <= CHUNK_BYTES and (left + filled >= size or filled < CHUNK_BYTES):
            buffer[CHUNK_BYTES - left : CHUNK_BYTES] = tail
            window = Window(buffer, CHUNK_BYTES - left, CHUNK_BYTES + filled)
        else:
            more = size - left - filled
            behind = self._reader.fetch(at + left + filled, more) if more > 0 else b""
            parts = (
                tail,
                buffer[CHUNK_BYTES : CHUNK_BYTES + filled],
                np.frombuffer(behind, np.uint8),
            )
            data = np.concatenate(parts)
            window = Window(data, 0, len(data))
        self._current, self._start = window, at
        self._buffers.reverse()
        self._ahead_start = self._end
        if self._thread is not None and filled == CHUNK_BYTES:
            self._ahead = self._thread.submit(self._fill, self._buffers[0], self._ahead_start)
        return window

    def _next(self, at: int) -> tuple[Bytes, int]:
        ahead, self._ahead = self._ahead, None
        buffer = self._buffers[0]
        return buffer, self._fill(buffer, at) if ahead is None else ahead.result()

    def _fill(self, buffer: Bytes, at: int) -> int:
        """Read a chunk into the back half of a buffer; return its size in bytes."""
        room = buffer.data[CHUNK_BYTES:]
        if isinstance(self._reader, LocalReader):
            return self._reader.fetch_into(room, at)
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


class Hashing(Windows):
    """All of a local file, piece by piece, of which only hashes and `near` remain.

    A piece is small enough to stay in a core's own cache until it is hashed. `near` is one of two
    in turn: what was gathered of a batch stands while the next is read, in another thread.
    """

    is_whole = True

    def __init__(self, reader: LocalReader) -> None:
        super().__init__(reader)
        self.near, self._other = Gathering(), Gathering()
        self.near_bytes = HEAD_BYTES  # of each member; see Skipping
        self.descriptor = reader.descriptor
        self.piece = _spare_pieces.pop() if _spare_pieces else np.empty(_PIECE_BYTES, np.uint8)
        self._file = reader
        self._is_announced = reader.read_in_order()

    def turn(self) -> None:
        """Begin a batch in the buffer that is not in use."""
        self.near, self._other = self._other, self.near
        self.near.clear()

    def ahead(self, at: int) -> int:
        """Have the disk read what follows the next bytes from `at`; return where those end."""
        until = at + _AHEAD_BYTES
        if self._is_announced:
            self._file.will_need(until, _AHEAD_BYTES)
        return until

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer only at the end of the tar."""
        return self._file.fetch(offset, size)  # its own window is another thread's

    def window(self, at: int, size: int) -> Window:
        """Return what lies at the byte `at` and behind it."""
        room = self.piece if size <= _PIECE_BYTES else np.empty(size, np.uint8)
        self._current = Window(room, 0, self._file.fetch_into(room.data, at))
        self._start = at
        return self._current

    def close(self) -> None:
        """Hand the buffers on."""
        self.near.hand_on()
        self._other.hand_on()
        if not _spare_pieces:
            _spare_pieces.append(self.piece)
