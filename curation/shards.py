"""Walk along the headers of a tar: where every member lies, thousands of them at once.

Python's tarfile builds an object a member, webdataset reads the whole file; here a short loop
follows the sizes from header to header, and numpy takes the names and checks the sums of all of
them together. A header that is not plain (PAX, GNU long names, base-256 sizes, links) is read by
itself, in tar_headers.py. A damaged tar is read up to the damage, which `TarDamageError` then
names. Read next: grouping.py, where members become samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from struct import Struct

import numpy as np
import numpy.typing as npt

from curation.plain_headers import (
    NAME_BYTES,
    Bytes,
    are_plain,
    decode_names,
    header_blocks,
    prefixed_names,
)
from curation.spans import WINDOW_BYTES, LocalReader, SpanReader
from curation.tar_headers import BLOCK, Member, TarDamageError, check_end, padded, read_member
from curation.windows import BATCH_BYTES, MAX_MEMBER_BYTES, Chunks, Hashing, Skipping, Window

__all__ = ["BLOCK", "Batch", "Member", "TarDamageError", "padded", "read_batches", "read_members"]

Ints = npt.NDArray[np.int64]

_MAX_MEMBERS = 6000
# Texts and JSONs are smaller, pictures are not.
_MIN_HASHED_BYTES = 2048
# The size of a member in octal digits, and its type flag: b"0" or NUL where it is a file.
_SIZE_AND_FLAG = Struct("124x 11s 21x c")


def _no_ints() -> Ints:
    return np.zeros(0, np.int64)


@dataclass
class Batch:
    """Some members of a tar, one after the other, and those of its bytes that were read for them.

    `data[positions[i] : limits[i]]` is what was read of member i's data and behind it. It holds
    until the next batch is asked for.
    """

    starts: Ints = field(default_factory=_no_ints)
    offsets: Ints = field(default_factory=_no_ints)
    sizes: Ints = field(default_factory=_no_ints)
    positions: Ints = field(default_factory=_no_ints)
    limits: Ints = field(default_factory=_no_ints)
    # Of plain headers, as they lie there; what is of others is in `long_names`.
    raw_names: Bytes = field(default_factory=lambda: np.zeros((0, NAME_BYTES), np.uint8))
    long_names: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)  # of members that are no files
    digests: dict[int, bytes] = field(default_factory=dict)  # xxh3-128, where they were asked for
    data: bytes | bytearray = b""
    is_last_truncated: bool = False
    is_too_short: bool = False  # says the one who uses it: read more behind each header from now on

    @cached_property
    def names(self) -> list[str]:
        """The names, decoded."""
        return decode_names(self.raw_names, self.long_names)

    def members(self) -> Iterator[Member]:
        """Yield the members one by one."""
        last = len(self.starts) - 1
        columns = (column.tolist() for column in (self.starts, self.offsets, self.sizes))
        for i, (name, start, offset, size) in enumerate(zip(self.names, *columns, strict=True)):
            kind, cut = self.kinds.get(i, "file"), self.is_last_truncated and i == last
            yield Member(name, start, offset, size, kind, cut)


def read_members(reader: SpanReader) -> Iterator[Member]:
    """Yield the members of a tar in order.

    Raises:
        TarDamageError: after the last good member, where the rest cannot be read.
    """
    for batch in read_batches(reader):
        yield from batch.members()


def read_batches(
    reader: SpanReader, *, whole: bool = False, digests: bool = False
) -> Iterator[Batch]:
    """Yield the members of a tar in order; `whole`: the bytes of all of them will be wanted.

    `digests`: no more than their hashes will, of those that are not small.

    Raises:
        TarDamageError: after the last good member, where the rest cannot be read.
    """
    near = reader if isinstance(reader, LocalReader) and not whole else None
    near_windows = Hashing if digests else Skipping
    with closing(Chunks(reader) if near is None else near_windows(near)) as windows:
        at, doubtful = 0, False
        while True:
            walk = _Walk(windows, at)
            walk.run(by_itself=doubtful)
            doubt = walk.check()
            if len(walk.batch.starts):
                yield walk.batch
                if isinstance(windows, Skipping) and (walk.is_choppy or walk.batch.is_too_short):
                    windows.near_bytes = WINDOW_BYTES
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

    def __init__(self, windows: Skipping | Chunks, at: int) -> None:
        self.at = at
        self.batch = Batch()
        self.error: TarDamageError | None = None
        self.is_end = False
        self._windows = windows
        self._window = Window(b"", 0, 0)
        self._behind = 0  # what to add to a position in the data for one in the tar
        self._is_truncated = False
        # Of each member: the position of its header in the data, and its size.
        self._headers: list[int] = []
        self._sizes: list[int] = []
        self._special: dict[int, Member] = {}  # which were read by themselves
        # Of each window: the number of members behind it, its end in the data, and `_behind`.
        self._windows_seen: list[tuple[int, int, int]] = []

    def run(self, *, by_itself: bool) -> None:
        """Follow the headers until enough of them were seen, or the tar ends.

        `by_itself`: the first one looks plain and is not.
        """
        windows = self._windows
        try:
            if isinstance(windows, Chunks):
                self._walk_window(by_itself)
                return
            windows.clear()
            while not self.is_end and self._has_room():
                if not by_itself:
                    self._skip_along(windows)
                    if self.is_end or not self._has_room():
                        return
                self._walk_window(by_itself)
                by_itself = False
        except TarDamageError as error:
            self.error = error

    @property
    def is_choppy(self) -> bool:
        """Tell whether most windows held no more than one header: what is between is longer."""
        return len(self._headers) < 1.9 * len(self._windows_seen)

    def _has_room(self) -> bool:
        windows = self._windows
        is_full = isinstance(windows, Skipping) and windows.num_bytes >= BATCH_BYTES
        return len(self._headers) < _MAX_MEMBERS and not is_full

    def _skip_along(self, windows: Skipping) -> None:
        """Follow plain headers from window to window, as fast as Python can; stop at any other."""
        headers, sizes, seen = self._headers, self._sizes, self._windows_seen
        add_header, add_size, look = headers.append, sizes.append, _SIZE_AND_FLAG.unpack_from
        data, append = windows.data, windows.append
        hashing = windows if isinstance(windows, Hashing) else None
        first, at, behind, is_plain = len(headers), self.at, 0, True
        while is_plain and len(headers) < _MAX_MEMBERS and windows.num_bytes < BATCH_BYTES:
            before = len(headers)
            begin, end = append(at, before - first)
            position, last = begin, end - BLOCK
            try:
                while position <= last:
                    text, flag = look(data, position)
                    size = int(text, 8)
                    if (flag != b"0" and flag != b"\0") or size < 0:
                        is_plain = False
                        break
                    add_header(position)
                    add_size(size)
                    position += 512 + (size + 511 & -512)
            except ValueError:
                is_plain = False
            seen.append((len(headers), end, at - begin))
            if len(headers) == before:
                break
            behind = at - begin
            if hashing is not None:
                self._hash(hashing, before, behind)
            at += position - begin
        windows.num_headers += len(headers) - first
        self.at = at
        if len(headers) > first:
            self._check_reach(headers[-1] + behind + BLOCK + sizes[-1])

    def _hash(self, windows: Hashing, first: int, behind: int) -> None:
        """Hash the members from row `first` on; `behind`: see `_behind`."""
        sizes = self._sizes
        for row in range(first, len(sizes)):
            if sizes[row] >= _MIN_HASHED_BYTES:
                member = self._special.get(row)
                offset = self._headers[row] + behind + BLOCK if member is None else member.offset
                digest = windows.digest(offset, sizes[row])
                if digest is not None:
                    self.batch.digests[row] = digest

    def _check_reach(self, end: int) -> None:
        if not self._windows.reaches(end):
            self._is_truncated = self.is_end = True

    def _walk_window(self, by_itself: bool) -> None:
        self._look(BLOCK)
        data, position, end = self._window
        if end - position < BLOCK:
            raise self._ended(end - position)
        size, first = None if by_itself else _plain_size(data, position), len(self._headers)
        if size is not None:
            self._look(BLOCK + size)
        try:
            while not self.is_end and (by_itself or self._follow()):
                by_itself = False
                if not self._read_by_itself():
                    break
        finally:  # what was found before damage is good
            self._windows_seen.append((len(self._headers), self._window.end, self._behind))
            if isinstance(self._windows, Hashing):
                self._hash(self._windows, first, self._behind)

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
        headers, sizes, look = self._headers, self._sizes, _SIZE_AND_FLAG.unpack_from
        first, num_before = self.at - self._behind, len(headers)
        position, last, is_whole, is_plain = first, end - BLOCK, self._windows.is_whole, True
        try:
            while position <= last and len(headers) < _MAX_MEMBERS:
                text, flag = look(data, position)
                size = int(text, 8)
                if (flag != b"0" and flag != b"\0") or size < 0:
                    is_plain = False
                    break
                next_position = position + 512 + (size + 511 & -512)
                if is_whole and next_position > end and headers and position + BLOCK + size > end:
                    break
                headers.append(position)
                sizes.append(size)
                position = next_position
        except ValueError:
            is_plain = False
        self.at = position + self._behind
        self._windows.num_headers += len(headers) - num_before
        if len(headers) > num_before:
            self._check_reach(headers[-1] + self._behind + BLOCK + sizes[-1])
        return not is_plain

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
        self._special[len(self._headers)] = member
        self._headers.append(0)
        self._sizes.append(member.size)
        self.at = member.offset + padded(member.size)
        if member.is_truncated:
            self._is_truncated = self.is_end = True
        return self.at <= self._window.end + self._behind - BLOCK

    def _ended(self, num_bytes: int) -> TarDamageError:
        if num_bytes:
            return TarDamageError(f"truncated inside a header at byte {self.at}")
        return TarDamageError(f"ends at byte {self.at} without an end-of-archive block")

    def check(self) -> int | None:
        """Fill in the batch and check its headers; return where one is that is not plain.

        The batch ends before that one.
        """
        batch, special = self.batch, self._special
        headers, batch.sizes = np.array(self._headers, np.int64), np.array(self._sizes, np.int64)
        if not len(headers):
            return None
        counts, ends, behind = np.array(self._windows_seen, np.int64).T
        counts = np.diff(counts, prepend=0)
        batch.limits, behind = np.repeat(ends, counts), np.repeat(behind, counts)
        windows = self._windows
        batch.data = windows.data if isinstance(windows, Skipping) else self._window.data
        batch.positions = headers + BLOCK
        batch.starts, batch.offsets = headers + behind, batch.positions + behind
        for row, member in special.items():
            batch.starts[row], batch.offsets[row] = member.start, member.offset
            batch.positions[row] = member.offset - behind[row]
            batch.long_names[row] = member.name
            if member.kind != "file":
                batch.kinds[row] = member.kind
        batch.is_last_truncated = self._is_truncated
        is_special = np.zeros(len(headers), np.bool_)
        is_special[list(special)] = True
        blocks = header_blocks(batch.data, headers)
        is_good = are_plain(blocks) | is_special
        batch.raw_names = blocks[:, :NAME_BYTES]
        doubt = None
        if not is_good.all():
            first_bad = int(is_good.argmin())
            doubt = int(batch.starts[first_bad])
            self._cut(first_bad)
        for row, name in prefixed_names(blocks[: len(batch.starts)]):
            if not is_special[row]:
                batch.long_names[row] = name
        return doubt

    def _cut(self, num_rows: int) -> None:
        batch = self.batch
        for name in ("starts", "offsets", "sizes", "positions", "limits", "raw_names"):
            setattr(batch, name, getattr(batch, name)[:num_rows])
        batch.digests = {row: digest for row, digest in batch.digests.items() if row < num_rows}
        batch.kinds = {row: kind for row, kind in batch.kinds.items() if row < num_rows}
        batch.long_names = {row: name for row, name in batch.long_names.items() if row < num_rows}
        batch.is_last_truncated = False


def _plain_size(data: bytes | bytearray, position: int) -> int | None:
    """Return the size of what looks like a plain file at a position; None: it does not."""
    text, flag = _SIZE_AND_FLAG.unpack_from(data, position)
    try:
        size = int(text, 8)
    except ValueError:
        return None
    return size if size >= 0 and flag in (b"0", b"\0") else None


def _truncated(batch: Batch, reader: SpanReader) -> TarDamageError:
    *_, member = batch.members()
    return TarDamageError(
        f"truncated at byte {reader.end()}, inside member {member.name!r} "
        f"({member.size} bytes from byte {member.offset})"
    )
