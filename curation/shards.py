"""Walk along the headers of a tar: where every member lies, thousands of them at once.

Python's tarfile builds an object a member, webdataset reads the whole file; here a compiled loop
(kernels.py) checks plain headers and follows the sizes from one to the next. A header that is not
plain (PAX, GNU long names, base-256 sizes, links) is read by itself, in tar_headers.py. A damaged
tar is read up to the damage, which `TarDamageError` then names. Read next: grouping.py, where
members become samples.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from curation.names import NAME_BYTES, Bytes, Ints, decode_names
from curation.spans import WINDOW_BYTES, LocalReader, SpanReader
from curation.tar_headers import BLOCK, Member, TarDamageError, check_end, padded, read_member
from curation.windows import (
    BATCH_BYTES,
    HEAD_BYTES,
    MAX_MEMBER_BYTES,
    NEAR_BYTES,
    Chunks,
    Gathering,
    Hashing,
    Skipping,
    Window,
    Windows,
)

__all__ = ["BLOCK", "Batch", "Member", "TarDamageError", "padded", "read_batches", "read_members"]

Words = npt.NDArray[np.uint64]

_MAX_MEMBERS = 6000
# Texts and JSONs are smaller, pictures are not. (`Hashing` keeps what is smaller.)
_MIN_HASHED_BYTES = HEAD_BYTES
_NO_WINDOW = Window(np.zeros(0, np.uint8), 0, 0)


@dataclass
class Batch:
    """Some members of a tar, one after the other, and those of its bytes that were read for them.

    `data[positions[i] : limits[i]]` is what was read of member i's data and behind it. It holds
    until the next batch is asked for.
    """

    starts: Ints
    offsets: Ints
    sizes: Ints
    positions: Ints
    limits: Ints
    raw_names: Bytes  # of plain headers, as they lie there; what is of others is in `long_names`
    data: Bytes
    long_names: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)  # of members that are no files
    # Where they were asked for: rows, and the xxh3-128 of each (its high and its low word).
    hashed_rows: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    hashes: Words = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    is_last_truncated: bool = False
    is_too_short: bool = False  # says the one who uses it: read more behind each header from now on

    @cached_property
    def names(self) -> list[str]:
        """The names, decoded."""
        return decode_names(self.raw_names, self.long_names)

    @cached_property
    def digests(self) -> dict[int, bytes]:
        """The hashes that were asked for, by row, as xxhash writes them."""
        return dict(zip(self.hashed_rows.tolist(), digests_of(self.hashes).tolist(), strict=True))

    def members(self) -> Iterator[Member]:
        """Yield the members one by one."""
        last = len(self.starts) - 1
        columns = (column.tolist() for column in (self.starts, self.offsets, self.sizes))
        for i, (name, start, offset, size) in enumerate(zip(self.names, *columns, strict=True)):
            kind, cut = self.kinds.get(i, "file"), self.is_last_truncated and i == last
            yield Member(name, start, offset, size, kind, cut)


def digests_of(hashes: Words) -> npt.NDArray[np.void]:
    """Return hashes, a high and a low word each, as the 16 bytes that xxhash writes."""
    return hashes.astype(">u8").view("V16").ravel()


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
    with closing(_windows(reader, whole, digests)) as windows:
        one_by_one = _walks(windows)
        walks = _ahead(one_by_one) if isinstance(windows, Hashing) else one_by_one
        with closing(walks):
            for walk in walks:
                if walk.num:
                    batch = walk.batch()
                    yield batch
                    if isinstance(windows, Skipping) and (walk.is_choppy or batch.is_too_short):
                        windows.near_bytes = WINDOW_BYTES
                    elif isinstance(windows, Hashing) and batch.is_too_short:
                        windows.near_bytes = NEAR_BYTES
                    if batch.is_last_truncated:
                        raise _truncated(batch, reader)
                if walk.error is not None:
                    raise walk.error


def _walks(windows: Windows) -> Generator[_Walk]:
    at, num_headers = 0, 0
    while True:
        walk = _Walk(windows, at, num_headers)
        walk.run()
        yield walk
        if walk.is_end or walk.error is not None:
            return
        at, num_headers = walk.at, num_headers + walk.num


def _ahead(walks: Iterator[_Walk]) -> Generator[_Walk]:
    """Yield the same, the next one under way while one is looked at."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, walks, None)
        while (walk := following.result()) is not None:
            following = thread.submit(next, walks, None)
            yield walk


def _windows(reader: SpanReader, whole: bool, digests: bool) -> Windows:
    if whole or not isinstance(reader, LocalReader):
        return Chunks(reader)
    return Hashing(reader) if digests else Skipping(reader)


class _Walk:
    """Makes one batch: `run` follows the headers."""

    def __init__(self, windows: Windows, at: int, num_before: int) -> None:
        from curation import kernels  # not at the top: whoever scans nothing need not wait for it

        self.at = at
        self.num = 0  # members found
        self.error: TarDamageError | None = None
        self.is_end = False
        self._kernels = kernels
        self._num_before = num_before
        self._windows = windows
        self._is_hashing = isinstance(windows, Hashing)
        self._window = _NO_WINDOW
        self._behind = 0  # what to add to a position in the window for one in the tar
        self._is_truncated = False
        self._table = np.empty((6, _MAX_MEMBERS), np.int64)  # rows as kernels.py names them
        self._names = np.empty((_MAX_MEMBERS, NAME_BYTES), np.uint8)
        self._special: dict[int, Member] = {}  # which were read by themselves
        self._hashes = np.empty((_MAX_MEMBERS if self._is_hashing else 0, 2), np.uint64)
        self._num_windows = 0
        self._near: Gathering | None = None  # where what lies near headers was gathered

    def run(self) -> None:
        """Follow the headers until enough of them were seen, or the tar ends."""
        windows, is_odd = self._windows, False
        try:
            if not isinstance(windows, Skipping | Hashing):
                self._walk_window()
                return
            if isinstance(windows, Hashing):
                windows.turn()
            else:
                windows.near.clear()
            self._near = windows.near
            while self._goes_on(windows):
                if isinstance(windows, Skipping):
                    self._skip_along(windows)
                elif not is_odd:
                    self._hash_along(windows)
                if self._goes_on(windows):
                    num_special = len(self._special)
                    self._walk_window()
                    # Where one header is not plain, the next ones mostly are not either.
                    is_odd = len(self._special) > num_special
        except TarDamageError as error:
            self.error = error

    @property
    def is_choppy(self) -> bool:
        """Tell whether most windows held no more than one header: what is between is longer."""
        return self.num < 1.9 * self._num_windows

    def _goes_on(self, windows: Skipping | Hashing) -> bool:
        is_full = self.num >= _MAX_MEMBERS or windows.near.num_bytes >= BATCH_BYTES
        return not (self.is_end or is_full)

    def _skip_along(self, windows: Skipping) -> None:
        """Follow plain headers from window to window; stop at any other."""
        before, near = self.num, windows.near
        self.num, self.at, near.num_bytes, num_windows = self._kernels.skip_along(
            windows.descriptor, near.data, near.num_bytes, self.at, windows.sizes,
            self._num_before + before, before, self._table, self._names,
        )  # fmt: skip
        self._num_windows += num_windows
        self._check_reach(before)

    def _hash_along(self, windows: Hashing) -> None:
        """Follow plain headers, hashing what is between them; stop at any other."""
        near, sizes = windows.near, (windows.near_bytes, _MIN_HASHED_BYTES, BATCH_BYTES)
        until = 0
        while self.at >= until and self._goes_on(windows):
            until = windows.ahead(self.at)
            self.num, self.at, near.num_bytes = self._kernels.hash_along(
                windows.descriptor, windows.piece, near.data, near.num_bytes, self.at, until,
                sizes, self.num, self._table, self._names, self._hashes,
            )  # fmt: skip

    def _check_reach(self, before: int) -> None:
        """See whether the tar has all of the last member, if any was found since `before`."""
        offset, size = self._table[self._kernels.OFFSET :, self.num - 1][:2].tolist()
        if self.num > before and not self._windows.reaches(offset + size):
            self._is_truncated = self.is_end = True

    def _walk_window(self) -> None:
        """Follow the headers in the window that begins at `at`, plain or not."""
        first, windows = self.num, self._windows
        windows.num_headers = self._num_before + first
        self._look(BLOCK)
        _, position, end = self._window
        if end - position < BLOCK:
            raise self._ended(end - position)
        self._num_windows += 1
        try:
            while not self.is_end and self._follow(first) and self._read_by_itself(first):
                pass
        finally:  # what was found before damage is good
            if isinstance(windows, Hashing):
                self._hash(windows, first)

    def _look(self, size: int) -> None:
        """Move the window to `at`; with whole members, so that `size` bytes are in it."""
        window = self._window
        if size == BLOCK or (
            self._windows.is_whole and window.end - window.position < size <= MAX_MEMBER_BYTES
        ):
            self._window = self._windows.window(self.at, size)
            self._behind = self.at - self._window.position

    def _follow(self, first: int) -> bool:
        """Follow plain headers through the window; tell whether one that is not plain is next.

        Members from row `first` on are in this window.
        """
        why = self._walk(first if self._windows.is_whole else _MAX_MEMBERS)
        if why == self._kernels.NOT_WHOLE and self.num == first:
            self._look(BLOCK + int(self._table[self._kernels.SIZE, first]))
            why = self._walk(first + 1)  # if it is not whole now, then it cannot be had
        return why == self._kernels.NOT_PLAIN

    def _walk(self, whole_from: int) -> int:
        data, _, end = self._window
        before, behind = self.num, self._behind
        self.num, position, why = self._kernels.walk(
            data, self.at - behind, end, behind, before, whole_from, self._table, self._names
        )
        self.at = position + behind
        self._check_reach(before)
        return why

    def _read_by_itself(self, first: int) -> bool:
        """Read the header at `at` whatever it is; False: it is left to the next window."""
        if not any(self._windows.read(self.at, BLOCK)):
            check_end(self._windows, self.at)
            self.is_end = True
            return True
        member = read_member(self._windows, self.at)
        if self._windows.is_whole and member.offset + member.size > self._window.end + self._behind:
            if self.num > first:
                return False
            self._look(member.offset + member.size - self.at)
        row, self.num = self.num, self.num + 1
        position, limit = member.offset - self._behind, self._window.end
        self._table[:, row] = member.start, member.offset, member.size, position, limit, 0
        self._names[row] = 0
        self._special[row] = member
        self.at = member.offset + padded(member.size)
        if member.is_truncated:
            self._is_truncated = self.is_end = True
        return self.at <= self._window.end + self._behind - BLOCK

    def _hash(self, windows: Hashing, first: int) -> None:
        """Hash the members from row `first` on, and keep what is near their headers."""
        near, table, data = windows.near, self._table, self._window.data
        self._kernels.hash_members(data, _MIN_HASHED_BYTES, first, self.num, table, self._hashes)
        near.num_bytes = self._kernels.gather(
            data, near.data, near.num_bytes, windows.near_bytes, first, self.num, table
        )

    def _ended(self, num_bytes: int) -> TarDamageError:
        if num_bytes:
            return TarDamageError(f"truncated inside a header at byte {self.at}")
        return TarDamageError(f"ends at byte {self.at} without an end-of-archive block")

    def batch(self) -> Batch:
        """Return what was found."""
        special, near = self._special.items(), self._near
        starts, offsets, sizes, positions, limits, is_hashed = self._table[:, : self.num]
        hashed_rows = np.flatnonzero(is_hashed)
        return Batch(
            starts=starts, offsets=offsets, sizes=sizes, positions=positions, limits=limits,
            raw_names=self._names[: self.num],
            data=self._window.data if near is None else near.data,
            long_names={row: member.name for row, member in special},
            kinds={row: member.kind for row, member in special if member.kind != "file"},
            hashed_rows=hashed_rows,
            hashes=self._hashes[hashed_rows],
            is_last_truncated=self._is_truncated,
        )  # fmt: skip


def _truncated(batch: Batch, reader: SpanReader) -> TarDamageError:
    *_, member = batch.members()
    return TarDamageError(
        f"truncated at byte {reader.end()}, inside member {member.name!r} "
        f"({member.size} bytes from byte {member.offset})"
    )
