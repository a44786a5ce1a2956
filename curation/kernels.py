"""The inner loops of a scan, compiled: along headers, over names, over the heads of JPEGs.

They do what is usual and say where something is not; that, the careful code does (tar_headers.py,
grouping.py, image_header.py). Imported where a tar is scanned and nowhere else (see compiled.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.compiled import compiled  # before numba itself, which it keeps from scipy
from curation.xxh3 import xxh3_128

from numba import types  # isort: skip

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

# Columns of a table of members under construction.
START, OFFSET, SIZE, POSITION, LIMIT, IS_HASHED = range(6)
# Why a walk stopped: the window or the room for rows is at its end; the next header is not plain;
# its member is not in the window as a whole.
AT_END, NOT_PLAIN, NOT_WHOLE = range(3)
NO_MORE, ODD = -1, -2

_BLOCK = 512
_int: Any = np.int64  # of a byte: numba makes a float of a byte without a sign and a number
_NAME_BYTES = 100
_LONGEST_EXTENSION = 16

_INT = types.int64
_DATA = types.Array(types.uint8, 1, "C", readonly=True)
_BUFFER = types.Array(types.uint8, 1, "C")
_NAMES = types.Array(types.uint8, 2, "C")
_COLUMN = types.Array(types.int64, 1, "A", readonly=True)
_INTS = types.Array(types.int64, 1, "C")
_TABLE = types.Array(types.int64, 2, "C")
_HASHES = types.Array(types.uint64, 2, "C")
# Of the C library; addresses are numbers here.
_pread = types.ExternalFunction("pread", _INT(types.int32, types.uintp, _INT, _INT))
_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, _INT))
_memmove = types.ExternalFunction("memmove", types.uintp(types.uintp, types.uintp, _INT))


@compiled(_INT(_DATA, _INT, _INT))
def _octal(block: Bytes, begin: int, end: int) -> int:
    """Return the number that some octal digits are; -1 where one is none."""
    value = 0
    for i in range(begin, end):
        digit = _int(block[i]) - 48
        if digit < 0 or digit > 7:
            return -1
        value = value * 8 + digit
    return value


@compiled(types.boolean(_DATA))
def _is_ustar(block: Bytes) -> bool:
    """Tell whether the magic is "ustar" and NUL; GNU's own keeps other things in the prefix."""
    is_start = block[257] == 117 and block[258] == 115 and block[259] == 116
    return bool(is_start and block[260] == 97 and block[261] == 114 and block[262] == 0)


@compiled(_INT(_DATA))
def _plain_size(block: Bytes) -> int:
    """Return the size in bytes of the file that a plain header announces; -1: it is not plain.

    Plain: ustar or older, a file, its numbers octal, its check sum right, its name not empty and in
    one piece.
    """
    if block[0] == 0 or (block[156] != 48 and block[156] != 0):
        return -1
    if block[135] != 0 and block[135] != 32:
        return -1
    if block[345] != 0 and _is_ustar(block):  # a part of the name is in the prefix
        return -1
    total = 256  # the sum itself counts as eight spaces
    for i in range(_BLOCK):
        total += _int(block[i])
    for i in range(148, 156):
        total -= _int(block[i])
    if _octal(block, 148, 154) != total:
        return -1
    return _octal(block, 124, 135)


@compiled(types.UniTuple(_INT, 3)(_DATA, _INT, _INT, _INT, _INT, _INT, _TABLE, _NAMES))
def walk(
    data: Bytes,
    position: int,
    end: int,
    behind: int,
    num: int,
    whole_from: int,
    table: Ints,
    names: Bytes,
) -> tuple[int, int, int]:
    """Follow plain headers through `data[position:end]`; add rows to `table` and `names`.

    `behind`: what to add to a position for one in the tar. Members from row `whole_from` on must be
    in the window as a whole; of one that is not, the row behind the last has the size.
    Return the number of rows, the position, and why it stopped.
    """
    while num < len(names) and position + _BLOCK <= end:
        block = data[position : position + _BLOCK]
        size = _plain_size(block)
        if size < 0:
            return num, position, NOT_PLAIN
        after = position + _BLOCK + size
        table[SIZE, num] = size
        if after > end and num >= whole_from:
            return num, position, NOT_WHOLE
        table[START, num] = position + behind
        table[OFFSET, num] = position + behind + _BLOCK
        table[POSITION, num] = position + _BLOCK
        table[LIMIT, num] = end
        table[IS_HASHED, num] = 0
        names[num, :] = block[:_NAME_BYTES]
        num += 1
        position = (after - position + _BLOCK - 1) // _BLOCK * _BLOCK + position
    return num, position, AT_END


@compiled(
    types.UniTuple(_INT, 4)(
        types.int32, _BUFFER, _INT, _INT, types.UniTuple(_INT, 4), _INT, _INT, _TABLE, _NAMES
    )
)
def skip_along(
    descriptor: int,
    data: Bytes,
    used: int,
    at: int,
    sizes: tuple[int, int, int, int],
    num_before: int,
    num: int,
    table: Ints,
    names: Bytes,
) -> tuple[int, int, int, int]:
    """Follow plain headers from window to window, each read behind the one before in `data`.

    `sizes`: of a window in bytes; of one where members are small, which they are below so many on
    average; and of what `data` shall hold. `num_before`: headers found in the tar so far.
    Return the number of rows, where the next header is, the bytes used, the number of windows.
    """
    near, dense, dense_below, room = sizes
    first, num_windows = num, 0
    while num < len(names) and used < room:
        is_dense = at < (num_before + num - first) * dense_below
        size, got = dense if is_dense else near, 0
        while got < size:
            more = _pread(descriptor, data.ctypes.data + used + got, size - got, at + got)
            if more < 0:
                return num, at, used, num_windows  # whoever reads it again is told why
            if more == 0:
                break
            got += more
        found, position, why = walk(
            data, used, used + got, at - used, num, len(names), table, names
        )
        if found == num:
            return num, at, used, num_windows
        at += position - used
        num, num_windows = found, num_windows + 1
        # The next one begins on a block as well, as headers do.
        used += (got + _BLOCK - 1) // _BLOCK * _BLOCK
        if why == NOT_PLAIN:
            return num, at, used, num_windows
    return num, at, used, num_windows


@compiled(types.void(_DATA, _INT, _INT, _BUFFER, _INT))
def _copy(data: Bytes, begin: int, size: int, into: Bytes, at: int) -> None:
    """Copy a span of bytes; numba's own way does so byte by byte."""
    if size < 0 or begin < 0 or at < 0 or begin + size > len(data) or at + size > len(into):
        raise IndexError("a span is not within its buffer")
    _memcpy(into.ctypes.data + at, data.ctypes.data + begin, size)


@compiled(_INT(_DATA, _BUFFER, _INT, _INT, _INT, _INT, _TABLE))
def gather(
    data: Bytes, into: Bytes, used: int, near: int, first: int, num: int, table: Ints
) -> int:
    """Copy the first `near` bytes of members, rows of `table`, into a buffer; return its end.

    Their positions and limits become those in the buffer.
    """
    for row in range(first, num):
        begin = table[POSITION, row]
        size = min(table[SIZE, row], near, max(table[LIMIT, row] - begin, 0))
        _copy(data, begin, size, into, used)
        table[POSITION, row], table[LIMIT, row] = used, used + size
        used += size
    return used


@compiled(types.void(_DATA, _INT, _INT, _INT, _TABLE, _HASHES))
def hash_members(
    data: Bytes, smallest: int, first: int, num: int, table: Ints, hashes: Words
) -> None:
    """Write the hashes of members, rows of `table`, that are whole in `data` and not small.

    `smallest`: in bytes, xxh3.MIN_BYTES at least. A row of `hashes` is the high and the low word.
    """
    lanes = np.empty(8, np.uint64)
    for row in range(first, num):
        begin, size = table[POSITION, row], table[SIZE, row]
        if size >= smallest and begin >= 0 and begin + size <= min(table[LIMIT, row], len(data)):
            hashes[row, 0], hashes[row, 1] = xxh3_128(data.ctypes.data + begin, size, lanes)
            table[IS_HASHED, row] = 1


@compiled(
    types.UniTuple(_INT, 3)(
        types.int32, _BUFFER, _BUFFER, _INT, _INT, _INT, types.UniTuple(_INT, 3), _INT,
        _TABLE, _NAMES, _HASHES,
    )
)  # fmt: skip
def hash_along(
    descriptor: int,
    piece: Bytes,
    into: Bytes,
    used: int,
    at: int,
    until: int,
    sizes: tuple[int, int, int],
    num: int,
    table: Ints,
    names: Bytes,
    hashes: Words,
) -> tuple[int, int, int]:
    """Follow plain headers to the byte `until`, reading everything, piece by piece.

    Members are hashed while they are in the piece and thus in the core's cache; `into` gets their
    beginnings. `sizes`: of those; of the smallest member that is hashed; of what `into` shall hold.
    Return the number of rows, where the next header is, and the bytes used of `into`. It stops
    where a header is not plain and where a member is not in the piece as a whole.
    """
    near, smallest, room = sizes
    left = 0  # of the piece before, moved to the start of this one
    while num < len(names) and used < room and at < until:
        got = left
        while got < len(piece):
            more = _pread(descriptor, piece.ctypes.data + got, len(piece) - got, at + got)
            if more < 0:
                return num, at, used  # whoever reads it again is told why
            if more == 0:
                break
            got += more
        found, position, why = walk(piece, 0, got, at, num, num, table, names)
        if found == num:
            return num, at, used
        hash_members(piece, smallest, num, found, table, hashes)
        used = gather(piece, into, used, near, num, found, table)
        num, at = found, at + position
        if why == NOT_PLAIN:
            return num, at, used
        left = max(got - position, 0)  # its last member's padding may be missing
        _memmove(piece.ctypes.data, piece.ctypes.data + position, left)
    return num, at, used


@compiled(types.void(_DATA, _COLUMN, _COLUMN, _BUFFER))
def copy_spans(data: Bytes, begins: Ints, sizes: Ints, into: Bytes) -> None:
    """Copy spans of bytes one behind the other into a buffer; leave room for those of size < 0."""
    used = 0
    for i in range(len(begins)):
        size = sizes[i]
        if size > 0:
            _copy(data, begins[i], size, into, used)
        used += abs(size)


@compiled(_INT(_NAMES, types.Array(types.uint64, 2, "C"), _INT, _INT, _INTS, _INTS))
def split_names(
    texts: Bytes, known: Words, num_known: int, row: int, dots: Ints, codes: Ints
) -> int:
    """Find the dot before the extension of each name from `row` on, and the extension's number.

    Return NO_MORE; the row whose extension is not `known` yet; or ODD where a name is not usual.
    """
    text = np.zeros(_LONGEST_EXTENSION, np.uint8)
    for n in range(row, len(texts)):
        name = texts[n]
        size, dot, slash = 0, -1, -1
        while size < _NAME_BYTES and name[size] != 0:
            byte = name[size]
            if byte > 127:
                return ODD
            if byte == 47:
                if size == 0 or (size >= 2 and name[size - 1] == 46 and name[size - 2] == 46):
                    return ODD  # an absolute path, or `..`
                slash, dot = size, -1
            elif byte == 46 and dot < 0:
                dot = size
            size += 1
        for i in range(size, _NAME_BYTES):
            if name[i] != 0:
                return ODD
        length = size - dot - 1
        if dot <= slash + 1 or length < 1 or length > _LONGEST_EXTENSION:
            return ODD
        text[:] = 0
        text[:length] = name[dot + 1 : size]
        words = text.view(np.uint64)
        code = -1
        for i in range(num_known):
            if known[i, 0] == words[0] and known[i, 1] == words[1]:
                code = i
                break
        if code < 0:
            return n
        dots[n], codes[n] = dot, code
    return NO_MORE


@compiled(types.UniTuple(_INT, 2)(_NAMES, _INTS, _INTS, _INTS, _BUFFER, _INT, _INT))
def group_names(
    texts: Bytes, dots: Ints, codes: Ints, starts: Ints, last: Bytes, last_dot: int, found: int
) -> tuple[int, int]:
    """Find where the runs of names of one key start; return their number, or ODD.

    `last`: the name before these, with the dot of it, and one bit for each extension of its run,
    which are returned for the last name here. ODD: a run has an extension twice.
    """
    num = 0
    for n in range(len(texts)):
        before = texts[n - 1] if n > 0 else last
        goes_on = dots[n] == (dots[n - 1] if n > 0 else last_dot)
        if goes_on:
            for i in range(dots[n]):
                if texts[n, i] != before[i]:
                    goes_on = False
                    break
        if not goes_on:
            starts[num], found = n, 0
            num += 1
        bit = 1 << codes[n]
        if found & bit:
            return ODD, found
        found |= bit
    return num, found


@compiled(types.void(_DATA, _COLUMN, _COLUMN, _TABLE))
def jpeg_sizes(data: Bytes, begins: Ints, ends: Ints, sizes: Ints) -> None:
    """Write (width, height) of the JPEGs at `data[begins[i]:ends[i]]`; (0, 0) where not sure.

    From segment to segment to the start of frame (ITU-T T.81, B.2.2), then to a scan.
    """
    for n in range(len(begins)):
        sizes[n, 0] = sizes[n, 1] = 0
        at, last = begins[n], ends[n] - 9
        if last <= at + 2 or data[at] != 0xFF or data[at + 1] != 0xD8:
            continue
        at += 2
        width, height = 0, 0
        while at < last and data[at] == 0xFF:
            marker = data[at + 1]
            if marker == 0xDA:  # start of scan
                sizes[n, 0], sizes[n, 1] = width, height
                break
            if 0xC0 <= marker <= 0xC2:  # baseline, extended and progressive
                height = _int(data[at + 5]) << 8 | _int(data[at + 6])
                width = _int(data[at + 7]) << 8 | _int(data[at + 8])
                components = data[at + 9]
                if data[at + 4] != 8 or width == 0 or height == 0:
                    break
                if components != 1 and components != 3 and components != 4:
                    break
            elif not (marker == 0xC4 or 0xDB <= marker <= 0xEF or marker == 0xFE):
                break
            length = _int(data[at + 2]) << 8 | _int(data[at + 3])
            if length < 2:
                break
            at += 2 + length
