"""Read the headers of a tar by `pread`: where every member of every sample lies, without its bytes.

Python's tarfile builds an object a member, webdataset reads the whole file; here only the 512-byte
headers are read, several times faster. Understood: ustar, PAX ('x', 'g'), GNU long names ('L',
'K'), base-256 sizes. A damaged tar is read up to the damage, which `TarDamageError` then names.
Formats: POSIX.1-2017 pax and the GNU tar manual, "Basic Tar Format". Read next: index.py.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from configs.errors import DataError

BLOCK = 512
# One look-ahead read brings a header, the small members behind it, and the start of a picture.
WINDOW_BYTES = 8192
# Longer names and PAX headers are an attack, not a name.
MAX_EXTENDED_HEADER_BYTES = 64 << 10

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
    start, end = 0, len(data.rstrip(b"\0"))
    while start < end:
        space = data.find(b" ", start, start + 10)
        digits = data[start:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = data[space + 1 : start + length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals or start + length > end:
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


IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
CAPTION_EXTENSIONS = frozenset({"txt", "json"})


@dataclass(slots=True)
class SampleMembers:
    """The members of one sample, in tar order."""

    key: str
    occurrence: int = 0  # how often the key came before in this shard
    members: list[tuple[str, Member]] = field(default_factory=list)  # (extension, member)
    extensions: set[str] = field(default_factory=set)

    def extend(self, members: Iterable[tuple[str, Member]]) -> None:
        """Add members."""
        for extension, member in members:
            self.members.append((extension, member))
            self.extensions.add(extension)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into its sample's key and its lower-cased extension.

    None for what is no part of a sample, or would leave a folder when unpacked: no extension, a
    hidden file, an absolute path, a path with `..`, a NUL.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or "\0" in name:
        return None
    if name.startswith("/") or ".." in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


class SampleGrouper:
    """Group members to samples: a run of members that share a key, until an extension repeats.

    A tar may be ordered by extension, so a later run joins the sample of its key; but only where it
    cannot put one sample's picture beside another's caption: the key has one sample so far, which
    has neither an image where the run has one nor any of the run's extensions, and the run is not a
    sample by itself (an image with a caption). Every other run is a new sample.
    """

    def __init__(self) -> None:
        self.num_ignored = 0  # links, devices, unsafe and unusable names
        self._samples: list[SampleMembers] = []
        self._first: dict[str, SampleMembers] = {}
        self._num_of_key: dict[str, int] = {}
        self._run: SampleMembers | None = None

    def add(self, member: Member) -> str | None:
        """Add the next member; return its extension, or None where it belongs to no sample."""
        if member.kind == "folder":
            return None
        parts = split_name(member.name) if member.kind == "file" else None
        if parts is None:
            self.num_ignored += 1
            return None
        key, extension = parts
        run = self._run
        if run is None or run.key != key or extension in run.extensions:
            self._end_run()
            run = self._run = SampleMembers(key)
        run.extend([(extension, member)])
        return extension

    def finish(self) -> list[SampleMembers]:
        """Return the samples of all members added, in the order of their first members."""
        self._end_run()
        return self._samples

    def _end_run(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        occurrence = self._num_of_key.get(run.key, 0)
        if occurrence == 1 and _belongs(run, self._first[run.key]):
            self._first[run.key].extend(run.members)
            return
        run.occurrence = occurrence
        self._num_of_key[run.key] = occurrence + 1
        self._first.setdefault(run.key, run)
        self._samples.append(run)


def _belongs(run: SampleMembers, sample: SampleMembers) -> bool:
    has_image = not IMAGE_EXTENSIONS.isdisjoint(run.extensions)
    is_sample = has_image and not CAPTION_EXTENSIONS.isdisjoint(run.extensions)
    has_both = has_image and not IMAGE_EXTENSIONS.isdisjoint(sample.extensions)
    return not is_sample and not has_both and run.extensions.isdisjoint(sample.extensions)
