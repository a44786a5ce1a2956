"""Read the headers of a tar by `pread`: where every member of every sample lies, without its bytes.

Python's tarfile builds an object a member, webdataset reads the whole file; here only the 512-byte
headers are read, several times faster. Understood: ustar, PAX ('x', 'g'), GNU long names ('L',
'K'), base-256 sizes. A damaged tar is read up to the damage, which `TarDamageError` then names.
Formats: POSIX.1-2017 pax and the GNU tar manual, "Basic Tar Format". Read next: index.py.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from configs.errors import DataError

BLOCK = 512
# One look-ahead read brings a header, the small members behind it, and the start of a picture.
WINDOW_BYTES = 8192
# Names longer than this are an attack, not a name.
MAX_EXTENDED_HEADER_BYTES = 1 << 20

_FILE_TYPES = (b"0", b"\0", b"7")
_KINDS = {
    b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device",
    b"5": "folder", b"6": "fifo", b"S": "sparse file",
}  # fmt: skip


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


class SpanReader:
    """Read byte ranges of one file; small ranges that follow each other share one system call.

    Safe on network file systems: `pread`, no memory map. Not for several threads at once.
    """

    def __init__(self, path: Path | str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self._descriptor).st_size
        self._window = b""
        self._window_start = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer only at the end of the file."""
        at = offset - self._window_start
        if at >= 0 and at + size <= len(self._window):
            return self._window[at : at + size]
        if size > WINDOW_BYTES:
            return self._pread(offset, size)
        self._window, self._window_start = self._pread(offset, WINDOW_BYTES), offset
        return self._window[:size]

    def _pread(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0 and (part := os.pread(self._descriptor, size, offset)):
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def read_members(reader: SpanReader) -> Iterator[Member]:
    """Yield the members of a tar in order.

    Raises:
        TarDamageError: after the last good member, where the rest cannot be read.
    """
    at, end = 0, reader.num_bytes
    while at < end:
        if at + BLOCK > end:
            raise TarDamageError(f"truncated inside a header at byte {at}")
        if not any(reader.read(at, BLOCK)):
            _check_end(reader, at)
            return
        member = _read_member(reader, at)
        yield member
        if member.is_truncated:
            raise TarDamageError(
                f"truncated at byte {end}, inside member {member.name!r} "
                f"({member.size} bytes from byte {member.offset})"
            )
        has_data = member.kind in ("file", "sparse file", "other")
        at = member.offset + (padded(member.size) if has_data else 0)
    raise TarDamageError(f"ends at byte {end} without an end-of-archive block")


def _check_end(reader: SpanReader, at: int) -> None:
    # tar pads to 10,240 bytes with zeros. Anything else (a second archive) would be lost unseen.
    behind = reader.read(at, WINDOW_BYTES) + reader.read(at + WINDOW_BYTES, 4 * BLOCK)
    if any(behind):
        raise TarDamageError(f"data after the end-of-archive block at byte {at}")


def _read_member(reader: SpanReader, start: int) -> Member:
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
    if text == "file" and name.endswith(b"/"):
        text = "folder"
    offset = at + BLOCK
    if kind == b"S":
        offset = _skip_sparse_map(reader, header, offset)
    if is_sparse:
        text = "sparse file"
    has_data = text in ("file", "sparse file", "other")
    is_truncated = has_data and offset + length > reader.num_bytes
    return Member(_text(name), start, offset, length if has_data else 0, text, is_truncated)


def _skip_sparse_map(reader: SpanReader, header: bytes, offset: int) -> int:
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
    data = data.rstrip(b"\0")
    while data:
        digits, space, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        record = data[len(digits) + 1 : length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not space or not equals or length > len(data):
            raise TarDamageError(f"corrupt PAX header at byte {at}")
        records[key] = value
        data = data[length:]
    return records


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's own magic keeps other things there
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _text(name: bytes) -> str:
    # Parquet holds UTF-8 only; the escape keeps different names different.
    return name.decode("utf-8", "backslashreplace")


@dataclass(slots=True)
class SampleMembers:
    """The members of one sample, in tar order."""

    key: str
    occurrence: int  # how often the key came before in this shard
    members: list[tuple[str, Member]] = field(default_factory=list)  # (extension, member)

    def find(self, extensions: frozenset[str]) -> tuple[str, Member] | None:
        """Return the first member with one of the extensions."""
        return next((pair for pair in self.members if pair[0] in extensions), None)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into its sample's key and its lower-cased extension.

    None for what is no part of a sample, or would leave a folder when unpacked: no extension, a
    hidden file, an absolute path, a path with `..`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or name.startswith("/") or ".." in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


class SampleGrouper:
    """Group members to samples: those that share a key, adjacent or not.

    A member whose extension its key already has begins a new sample of that key.
    """

    def __init__(self) -> None:
        self.samples: list[SampleMembers] = []
        self.num_ignored = 0  # links, devices, unsafe and unusable names
        self._open: dict[str, SampleMembers] = {}

    def add(self, member: Member) -> SampleMembers | None:
        """Add a member; return its sample, or None where it belongs to none."""
        if member.kind == "folder":
            return None
        parts = split_name(member.name) if member.kind == "file" else None
        if parts is None:
            self.num_ignored += 1
            return None
        key, extension = parts
        sample = self._open.get(key)
        if sample is None or any(known == extension for known, _ in sample.members):
            occurrence = 0 if sample is None else sample.occurrence + 1
            sample = self._open[key] = SampleMembers(key, occurrence)
            self.samples.append(sample)
        sample.members.append((extension, member))
        return sample
