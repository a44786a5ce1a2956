"""Read one header of a tar, with the extension headers before it, and check all that is in it.

Understood: ustar, PAX ('x', 'g'), GNU long names ('L', 'K'), base-256 sizes, sparse maps. Formats:
POSIX.1-2017 pax and the GNU tar manual, "Basic Tar Format". Read next: shards.py.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple, Protocol

from configs.errors import DataError
from curation.spans import WINDOW_BYTES

BLOCK = 512
# Longer names and PAX headers are an attack, not a name.
MAX_EXTENDED_HEADER_BYTES = 64 << 10

_FILE_TYPES = (b"0", b"\0", b"7")
_KINDS = {
    b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device",
    b"5": "folder", b"6": "fifo", b"S": "sparse file",
}  # fmt: skip


class Readable(Protocol):
    """What a tar can be read from."""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer only at the end of the tar."""

    def reaches(self, position: int) -> bool:
        """Tell whether the tar has `position` bytes and more."""


class TarDamageError(DataError):
    """A tar cannot be read beyond some byte; what was read before it is good."""


class Member(NamedTuple):
    """One entry of a tar. Its raw span is [start, offset + size rounded up to 512)."""

    name: str
    start: int  # of its header blocks, PAX and GNU long-name blocks included
    offset: int  # of its data
    size: int  # of its data, in bytes
    kind: str  # "file", "folder", "symbolic link", ...
    is_truncated: bool  # its data goes on beyond the end of the file


def padded(size: int) -> int:
    """Round a number of bytes up to whole blocks of 512."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def check_end(reader: Readable, at: int) -> None:
    """Raise TarDamageError where anything but zeros follows the end-of-archive block at `at`."""
    # tar pads to 10,240 bytes with zeros. Anything else (a second archive) would be lost unseen.
    behind = reader.read(at, WINDOW_BYTES) + reader.read(at + WINDOW_BYTES, 4 * BLOCK)
    if any(behind):
        raise TarDamageError(f"data after the end-of-archive block at byte {at}")


def read_member(reader: Readable, start: int) -> Member:
    """Read the header at `start`, with the extension headers before it."""
    at, name, size = start, None, None
    is_sparse = False
    while True:
        header = reader.read(at, BLOCK)
        if len(header) < BLOCK:
            raise TarDamageError(f"truncated inside a header at byte {at}")
        _check_sum(header, at)
        kind, length = header[156:157], _number(header[124:136], at)
        if kind not in (b"x", b"g", b"L", b"K"):
            break
        if length > MAX_EXTENDED_HEADER_BYTES:
            raise TarDamageError(f"an extended header of {length} bytes at byte {at}")
        data = reader.read(at + BLOCK, length)
        if len(data) < length:
            raise TarDamageError(f"truncated inside an extended header at byte {at}")
        if kind == b"L":
            name = data.split(b"\0", 1)[0]
        elif kind in (b"x", b"g"):
            records = _pax_records(data, at)
            if kind == b"g" and records.keys() & {b"path", b"size"}:
                raise TarDamageError(f"a global PAX header that names a file at byte {at}")
            name = records.get(b"path", name)
            if b"size" in records:
                size = _decimal(records[b"size"], at)
            is_sparse |= any(key.startswith(b"GNU.sparse") for key in records)
        at += BLOCK + padded(length)
        if kind == b"g" and name is None and size is None:
            start = at  # it belongs to no member: a copied span must not carry it
    length = length if size is None else size
    name = _header_name(header) if name is None else name
    text = "file" if kind in _FILE_TYPES else _KINDS.get(kind, "other")
    offset = at + BLOCK
    if kind == b"S":
        offset = _skip_sparse_map(reader, header, offset)
    if is_sparse:
        text = "sparse file"
    has_data = text in ("file", "sparse file", "other")
    is_truncated = has_data and not reader.reaches(offset + length)
    return Member(_text(name), start, offset, length if has_data else 0, text, is_truncated)


def _skip_sparse_map(reader: Readable, header: bytes, offset: int) -> int:
    more = header[482:483]
    while more not in (b"", b"\0"):
        more = reader.read(offset, BLOCK)[504:505]
        offset += BLOCK
    return offset


def _check_sum(header: bytes, at: int) -> None:
    # Adler-32's low half is 1 + the sum of the bytes, modulo 65521: the tar checksum at C speed.
    field_text = header[148:156]
    wanted = _number(field_text, at)
    got = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field_text) + 8 * 32
    if (got - wanted) % 65521 == 0:
        return
    signed = (
        sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + 8 * 32
    )
    if signed != wanted:  # some old tars sum signed bytes
        what = "not a tar file" if at == 0 else "corrupt header (its checksum does not match)"
        raise TarDamageError(f"{what} at byte {at}")


def _number(text: bytes, at: int) -> int:
    if text[0] == 0x80:  # base-256, GNU: for 8 GiB and more
        return int.from_bytes(text[1:], "big")
    digits = text.strip(b" \0")
    if digits and (digits.strip(b"01234567") or text[0] == 0xFF):
        what = "not a tar file" if at == 0 else "corrupt header (a number is not octal)"
        raise TarDamageError(f"{what} at byte {at}")
    return int(digits or b"0", 8)


def _decimal(text: bytes, at: int) -> int:
    if not text.isdigit() or len(text) > 18:
        raise TarDamageError(f"corrupt PAX header (a size is not a number) at byte {at}")
    return int(text)


def _pax_records(data: bytes, at: int) -> dict[bytes, bytes]:
    """Parse the records `LENGTH key=value LF` of a PAX header."""
    records = {}
    start, end = 0, len(data.rstrip(b"\0"))
    while start < end:
        space = data.find(b" ", start, start + 10)
        digits = data[start:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0  # 0 would never come to the end
        record = data[space + 1 : start + length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not length or not equals or start + length > end:
            raise TarDamageError(f"corrupt PAX header at byte {at}")
        records[key] = value
        start += length
    return records


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's own magic keeps other things there
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _text(name: bytes) -> str:
    # Parquet holds UTF-8 only; the escape keeps different names different.
    return name.decode("utf-8", "backslashreplace")
