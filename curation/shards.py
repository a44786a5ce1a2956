"""Walk along the headers of a tar: where every member lies, thousands of them at once.

Python's tarfile builds an object a member, webdataset reads the whole file; here a short loop
follows the sizes from header to header, and numpy takes the names and checks the sums of all of
them together. A header that is not plain (PAX, GNU long names, base-256 sizes, links) is read by
itself, in tar_headers.py. A damaged tar is read up to the damage, which `TarDamageError` then
names. Read next: grouping.py, where members become samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from curation.spans import LocalReader, SpanReader
from curation.tar_headers import BLOCK, Member, TarDamageError, check_end, padded, read_member
from curation.windows import MAX_MEMBER_BYTES, Chunks, Skipping, Window, Windows

__all__ = ["BLOCK", "Batch", "Member", "TarDamageError", "padded", "read_batches", "read_members"]

_MAX_MEMBERS = 6000
_MAX_BYTES = 12 << 20
_PLAIN = (0, 48)  # type flags of a file: NUL and "0"
_USTAR = np.frombuffer(b"ustar\0", np.uint8)  # GNU's own magic keeps other things in the prefix


@dataclass
class Batch:
    """Some members of a tar, one after the other, and those of its bytes that were read for them.

    `data[positions[i] : limits[i]]` is what was read of member i's data and behind it. It holds
    until the next batch is asked for.
    """

    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)  # of members that are no files
    data: bytes | bytearray = b""
    is_last_truncated: bool = False

    def members(self) -> Iterator[Member]:
        """Yield the members one by one."""
        last = len(self.names) - 1
        for i, name in enumerate(self.names):
            kind, cut = self.kinds.get(i, "file"), self.is_last_truncated and i == last
            yield Member(name, self.starts[i], self.offsets[i], self.sizes[i], kind, cut)


def read_members(reader: SpanReader) -> Iterator[Member]:
    """Yield the members of a tar in order.

    Raises:
        TarDamageError: after the last good member, where the rest cannot be read.
    """
    for batch in read_batches(reader):
        yield from batch.members()


def read_batches(reader: SpanReader, *, whole: bool = False) -> Iterator[Batch]:
    """Yield the members of a tar in order; `whole`: the bytes of all of them will be wanted.

    Raises:
        TarDamageError: after the last good member, where the rest cannot be read.
    """
    is_near = isinstance(reader, LocalReader) and not whole
    with closing(Skipping(reader) if is_near else Chunks(reader)) as windows:
        at, doubtful = 0, False
        while True:
            walk = _Walk(windows, at)
            walk.run(by_itself=doubtful)
            doubt = walk.check()
            if walk.batch.names:
                yield walk.batch
            if walk.batch.is_last_truncated:
                raise _truncated(walk.batch, reader)
            if doubt is None and walk.error is not None:
                raise walk.error
            if doubt is None and walk.is_end:
                return
            doubtful = doubt is not None
            at = walk.at if doubt is None else doubt


class _Walk:
    """Makes one batch: `run` follows the headers, `check` makes sure that they are some."""

    def __init__(self, windows: Windows, at: int) -> None:
        self.at = at
        self.batch = Batch()
        self.error: TarDamageError | None = None
        self.is_end = False
        self._windows = windows
        self._window = Window(b"", 0, 0)
        self._behind = 0  # what to add to a position in the window for one in the tar
        self._parts: list[bytes | bytearray] = []
        self._num_bytes = 0
        self._headers: list[int] = []  # position of each header in the data; -1: it was checked
        self._names: dict[int, str] = {}  # of those that were

    def run(self, *, by_itself: bool) -> None:
        """Follow the headers until enough of them were seen, or the tar ends.

        `by_itself`: the first one looks plain and is not.
        """
        windows = self._windows
        try:
            while len(self._headers) < _MAX_MEMBERS and not self.is_end:
                if self._parts and (windows.is_whole or self._num_bytes > _MAX_BYTES):
                    return
                if not self._windows.is_whole and not by_itself:
                    self._skip_along()
                    if self.is_end or len(self._headers) >= _MAX_MEMBERS:
                        return
                    if self._num_bytes > _MAX_BYTES:
                        return
                self._walk_window(by_itself)
                by_itself = False
        except TarDamageError as error:
            self.error = error

    def _skip_along(self) -> None:
        """Follow plain headers from window to window, as fast as Python can; stop at any other."""
        windows, headers, batch = self._windows, self._headers, self.batch
        first, at, shift, is_plain = len(headers), self.at, self._num_bytes, True
        add_header, add_size, add_start = headers.append, batch.sizes.append, batch.starts.append
        counts, ends = [], []
        while is_plain and len(headers) < _MAX_MEMBERS and shift < _MAX_BYTES:
            data = windows.skip_to(at, len(headers) - first)
            before, position, last = len(headers), 0, len(data) - BLOCK
            while position <= last:
                flag = data[position + 156]
                if flag != 48 and flag != 0:
                    is_plain = False
                    break
                try:
                    size = int(data[position + 124 : position + 135], 8)
                except ValueError:
                    size = -1
                if size < 0:
                    is_plain = False
                    break
                add_header(shift + position)
                add_size(size)
                add_start(at + position)
                position += 512 + ((size + 511) & -512)
            if len(headers) == before:
                break
            at += position
            shift += len(data)
            counts.append(len(headers) - before)
            ends.append(shift)
            self._parts.append(data)
        batch.offsets.extend([start + BLOCK for start in batch.starts[first:]])
        batch.positions.extend([header + BLOCK for header in headers[first:]])
        batch.limits.extend(np.repeat(np.array(ends, np.int64), counts).tolist())
        windows.num_headers += len(headers) - first
        self.at, self._num_bytes = at, shift
        if len(headers) > first and not windows.reaches(batch.offsets[-1] + batch.sizes[-1]):
            batch.is_last_truncated = self.is_end = True

    def _walk_window(self, by_itself: bool) -> None:
        self._look(BLOCK)
        data, position, end = self._window
        if end - position < BLOCK:
            raise self._ended(end - position)
        size = None if by_itself else _plain_size(data, position)
        if size is not None:
            self._look(BLOCK + size)
        num_rows = len(self._headers)
        try:
            while not self.is_end and (by_itself or self._follow()):
                by_itself = False
                if not self._read_by_itself():
                    break
        finally:  # what was found before damage is good
            num_new = len(self._headers) - num_rows
            self.batch.limits.extend([self._window.end + self._num_bytes] * num_new)
            self._parts.append(self._window.data)
            self._num_bytes += len(self._window.data)

    def _look(self, size: int) -> None:
        """Move the window to `at`; with whole members, so that `size` bytes are in it."""
        window = self._window
        if size == BLOCK or (
            self._windows.is_whole and window.end - window.position < size <= MAX_MEMBER_BYTES
        ):
            self._window = self._windows.window(self.at, size)
            self._behind = self.at - self._window.position

    def _follow(self) -> bool:
        """Follow plain headers through the window; tell whether one that is not plain is next."""
        data, _, end = self._window
        position, last, is_whole = self.at - self._behind, end - BLOCK, self._windows.is_whole
        first = position
        found: list[int] = []
        sizes: list[int] = []
        room = _MAX_MEMBERS - len(self._headers)
        is_plain = True
        while position <= last and room > len(found):
            size = _plain_size(data, position)
            if size is None:
                is_plain = False
                break
            if is_whole and position + BLOCK + size > end and (position > first or self._headers):
                break
            found.append(position)
            sizes.append(size)
            position += BLOCK + ((size + 511) & -512)
        self.at = position + self._behind
        if found:
            self._add(found, sizes)
        return not is_plain

    def _add(self, found: list[int], sizes: list[int]) -> None:
        shift, behind, batch = self._num_bytes, self._behind, self.batch
        self._windows.num_headers += len(found)
        self._headers.extend([position + shift for position in found])
        batch.sizes.extend(sizes)
        batch.starts.extend([position + behind for position in found])
        batch.offsets.extend([position + behind + BLOCK for position in found])
        batch.positions.extend([position + shift + BLOCK for position in found])
        if not self._windows.reaches(batch.offsets[-1] + sizes[-1]):
            batch.is_last_truncated = self.is_end = True

    def _read_by_itself(self) -> bool:
        """Read the header at `at` whatever it is; False: it is left to the next batch."""
        if not any(self._windows.read(self.at, BLOCK)):
            check_end(self._windows, self.at)
            self.is_end = True
            return True
        member = read_member(self._windows, self.at)
        if self._windows.is_whole and member.offset + member.size > self._window.end + self._behind:
            if self._headers:
                return False
            self._look(member.offset + member.size - self.at)
        batch, row = self.batch, len(self._headers)
        self._headers.append(-1)
        self._names[row] = member.name
        if member.kind != "file":
            batch.kinds[row] = member.kind
        batch.starts.append(member.start)
        batch.offsets.append(member.offset)
        batch.sizes.append(member.size)
        batch.positions.append(member.offset - self._behind + self._num_bytes)
        self.at = member.offset + padded(member.size)
        if member.is_truncated:
            batch.is_last_truncated = self.is_end = True
        return self.at <= self._window.end + self._behind - BLOCK

    def _ended(self, num_bytes: int) -> TarDamageError:
        if num_bytes:
            return TarDamageError(f"truncated inside a header at byte {self.at}")
        return TarDamageError(f"ends at byte {self.at} without an end-of-archive block")

    def check(self) -> int | None:
        """Fill in the names and check the headers; return where one is that is not plain.

        The batch ends before that one.
        """
        batch = self.batch
        batch.data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        rows = [row for row, header in enumerate(self._headers) if header >= 0]
        is_all = len(rows) == len(self._headers)
        positions = self._headers if is_all else [self._headers[row] for row in rows]
        names, num_good = names_of_headers(batch.data, positions)
        doubt = None
        if num_good < len(rows):
            first_bad = rows[num_good]
            doubt = batch.starts[first_bad]
            self._cut(first_bad)
        if is_all:
            batch.names = names
        else:
            by_row = {**dict(zip(rows, names, strict=False)), **self._names}
            batch.names = [by_row[row] for row in range(len(batch.starts))]
        return doubt

    def _cut(self, num_rows: int) -> None:
        batch = self.batch
        for column in (batch.starts, batch.offsets, batch.sizes, batch.positions, batch.limits):
            del column[num_rows:]
        batch.kinds = {row: kind for row, kind in batch.kinds.items() if row < num_rows}
        batch.is_last_truncated = False


def _plain_size(data: bytes | bytearray, position: int) -> int | None:
    """Return the size of what looks like a plain file at a position; None: it does not."""
    if data[position + 156] not in _PLAIN:
        return None
    try:
        size = int(data[position + 124 : position + 135], 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def _truncated(batch: Batch, reader: SpanReader) -> TarDamageError:
    *_, member = batch.members()
    return TarDamageError(
        f"truncated at byte {reader.end()}, inside member {member.name!r} "
        f"({member.size} bytes from byte {member.offset})"
    )


_CHECKSUM_WEIGHTS = 8 ** np.arange(5, -1, -1, dtype=np.int64)


def names_of_headers(data: bytes | bytearray, positions: Sequence[int]) -> tuple[list[str], int]:
    """Return the names in some headers, and how many of these, from the first, are plain and good.

    Plain: ustar or older, its numbers octal, its check sum right, its name in UTF-8 and not empty.
    """
    if not positions:
        return [], 0
    where = np.array(positions)
    if (where % BLOCK).any():
        joined = b"".join([data[p : p + BLOCK] for p in positions])
        rows = np.frombuffer(joined, np.uint8).reshape(-1, BLOCK)
    else:
        blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
        rows = blocks[where // BLOCK]
    stored = rows[:, 148:154] - np.uint8(48)
    sums = rows.sum(axis=1, dtype=np.int64) - rows[:, 148:156].sum(axis=1, dtype=np.int64) + 256
    is_good = (stored < 8).all(axis=1) & (stored.astype(np.int64) @ _CHECKSUM_WEIGHTS == sums)
    is_good &= (rows[:, 124:135] - np.uint8(48) < 8).all(axis=1)
    is_good &= np.isin(rows[:, 135], (0, 32)) & (rows[:, 0] != 0)
    num_good = len(rows) if is_good.all() else int(is_good.argmin())
    rows = rows[:num_good]
    raw = np.ascontiguousarray(rows[:, :100]).view("S100").ravel().tolist()
    has_prefix = (rows[:, 257:263] == _USTAR).all(axis=1) & (rows[:, 345] != 0)
    for row in np.flatnonzero(has_prefix).tolist():
        prefix = rows[row, 345:500].tobytes().split(b"\0", 1)[0]
        raw[row] = prefix + b"/" + raw[row].split(b"\0", 1)[0]
    try:
        names = b"\n".join(raw).decode().split("\n")
    except UnicodeDecodeError:
        names = []
    if len(names) != num_good or b"\0" in b"".join(raw):
        names = [name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace") for name in raw]
    return names, num_good
