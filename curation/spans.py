"""Read byte ranges of a tar wherever it lies: a local file, any fsspec URL, or inside a gzip.

    with open_tar("s3://bucket/00000.tar") as reader:
        header = reader.read(0, 512)

Local files are read by `pread`: safe on network file systems, no memory map. URLs are read by byte
ranges, and no more of them is held than the window. A gzip can only be read forward: going back
starts it anew, which is right but slow, so that whoever needs it at random unpacks it (unpack.py).
A reader is not for several threads at once.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import xxhash

from configs.errors import UsageError

if TYPE_CHECKING:
    import fsspec

# One look-ahead read brings a header, the small members behind it, and the start of a picture.
WINDOW_BYTES = 8192
# A request to remote storage takes as long as some hundred KiB do.
REMOTE_WINDOW_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
_FINGERPRINT_BYTES = 64 << 10
_FAR_AHEAD_BYTES = 1 << 20
_NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)
_PROBE = [bytearray(1)]

Storage = Mapping[str, Any]  # options of the fsspec file system, such as endpoint_url


def is_url(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path names remote storage: s3://bucket/key, https://host/file, ..."""
    return "://" in os.fspath(path)


class SpanReader(ABC):
    """Reads byte ranges of one file; small ranges that follow each other share one call.

    `num_bytes` is the size of the file as it lies there, which for a gzip is not that of the tar.
    """

    num_bytes: int
    window_bytes = WINDOW_BYTES
    is_gzip = False

    def __init__(self) -> None:
        self._window = b""
        self._window_start = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer only at the end of the tar."""
        at = offset - self._window_start
        if at >= 0 and at + size <= len(self._window):
            return self._window[at : at + size]
        if size > self.window_bytes:
            return self.fetch(offset, size)
        self._window, self._window_start = self.fetch(offset, self.window_bytes), offset
        return self._window[:size]

    @abstractmethod
    def fetch(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`, past the window."""

    def reaches(self, position: int) -> bool:
        """Tell whether the tar has `position` bytes and more."""
        return position <= self.num_bytes

    def end(self) -> int:
        """Return the size of the tar in bytes, once all of it was read."""
        return self.num_bytes

    def fingerprint(self) -> str:
        """Return a cheap identity of the file: xxh3-64 (hex) over its size and both its ends.

        64 KiB each; its size alone tells little: tars are padded to 10,240 bytes.
        """
        hasher = xxhash.xxh3_64(self.num_bytes.to_bytes(8, "little"))
        hasher.update(self.fetch_packed(0, _FINGERPRINT_BYTES))
        last = max(0, self.num_bytes - _FINGERPRINT_BYTES)
        hasher.update(self.fetch_packed(last, _FINGERPRINT_BYTES))
        return hasher.hexdigest()

    def state(self) -> object:
        """Return what changes when the file does; None where its storage does not say."""
        return None

    def fetch_packed(self, offset: int, size: int) -> bytes:
        """Return bytes of the file as it lies there."""
        return self.fetch(offset, size)

    def close(self) -> None:  # noqa: B027
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


@lru_cache(maxsize=64)
def read_ahead_bytes(device: int) -> int:
    """Return how far the kernel reads ahead of whoever reads a device in order; 0: not said."""
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        return int(path.read_text()) << 10
    except (OSError, ValueError):  # not Linux, or a part of a disk
        return 0


class LocalReader(SpanReader):
    """Reads a local file."""

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.descriptor)
        self.num_bytes = status.st_size
        self._state = (status.st_ino, status.st_mtime_ns, status.st_size)
        self._device = status.st_dev

    def state(self) -> object:
        """Return what changes when the file does."""
        return self._state

    def fetch(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`."""
        part = os.pread(self.descriptor, size, offset)
        if len(part) == size or not part:
            return part
        parts = [part]
        while (size := size - len(part)) and (
            part := os.pread(self.descriptor, size, offset := offset + len(part))
        ):
            parts.append(part)
        return b"".join(parts)

    def fetch_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from `offset`; return how many bytes there were."""
        filled = os.preadv(self.descriptor, [buffer], offset)
        while 0 < filled < len(buffer) and (
            more := os.preadv(self.descriptor, [buffer[filled:]], offset + filled)
        ):
            filled += more
        return filled

    def read_in_order(self) -> bool:
        """Say that all of the file will be read in order; tell whether it helps to announce more.

        Not where the kernel reads far ahead by itself, in large pages: what is announced it brings
        in small ones, and that took twice the time and the CPU.
        """
        if _NO_WAIT is None:  # not Linux
            return False
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return read_ahead_bytes(self._device) < _FAR_AHEAD_BYTES

    def will_need(self, offset: int, size: int) -> None:
        """Have the disk read a range that will be asked for soon; return at once."""
        if _NO_WAIT is None:  # not Linux
            return
        try:  # to announce what lies in memory would cost more than to copy it
            os.preadv(self.descriptor, _PROBE, offset + size - 1, _NO_WAIT)
        except OSError:  # it is not there, or the storage does not say
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


@lru_cache(maxsize=64)
def _file_system(protocol: str, storage: tuple[tuple[str, Any], ...]) -> fsspec.AbstractFileSystem:
    import fsspec  # not at the top: where all tars are local, no worker waits for it

    try:
        return fsspec.filesystem(protocol, **{key: _thawed(value) for key, value in storage})
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{protocol}:// cannot be read here ({error}). Expected a protocol of fsspec; "
            "`pip install pairmill[remote]` brings s3://."
        ) from None


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted((key, _frozen(v)) for key, v in value.items()))
    return value


def _thawed(value: Any) -> Any:
    return {k: _thawed(v) for k, v in value} if isinstance(value, tuple) else value


def file_system(url: str, storage: Storage | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL, made once a process, and the path in it.

    Raises:
        UsageError: no such protocol, or its package is missing.
    """
    protocol, _, rest = url.partition("://")
    system = _file_system(protocol, _frozen(storage or {}))
    # http needs the whole URL, the others only what is behind the protocol.
    return system, system._strip_protocol(url) if rest else rest


def as_storage_error(error: Exception) -> OSError:
    """Return what went wrong in a file system as the OSError that a local file would give."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "No such file")
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, "Permission denied")
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")


class RemoteReader(SpanReader):
    """Reads a file of remote storage by byte ranges."""

    window_bytes = REMOTE_WINDOW_BYTES

    def __init__(self, url: str, storage: Storage | None = None) -> None:
        super().__init__()
        self._system, self._path = file_system(url, storage)
        try:
            # What an earlier listing said may be old: the tar may have been written anew.
            self._system.invalidate_cache()
            info = self._system.info(self._path)
            self.num_bytes = int(info["size"])
            self._state = info.get("ETag") or info.get("LastModified") or info.get("mtime")
        except Exception as error:  # each file system has its own
            raise as_storage_error(error) from error

    def fetch(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`."""
        end = min(offset + size, self.num_bytes)
        if offset >= end:
            return b""
        try:
            data = bytes(self._system.cat_file(self._path, start=offset, end=end))
        except Exception as error:  # each file system has its own
            raise as_storage_error(error) from error
        if len(data) != end - offset:
            raise OSError(errno.EIO, f"{len(data)} of {end - offset} bytes came")
        return data

    def state(self) -> object:
        """Return what changes when the file does; None where its storage does not say."""
        return self._state

    @staticmethod
    def fetch_many(spans: Sequence[tuple[RemoteReader, int, int]]) -> list[bytes]:
        """Return ranges (reader, start, end) of several files, at once where storage can."""
        if not spans:
            return []
        starts = [start for _, start, _ in spans]
        ends = [min(end, reader.num_bytes) for reader, _, end in spans]
        system = spans[0][0]._system
        try:
            found = system.cat_ranges([r._path for r, _, _ in spans], starts, ends)
        except Exception as error:  # each file system has its own
            raise as_storage_error(error) from error
        for data, start, end in zip(found, starts, ends, strict=True):
            if len(data) != end - start:
                raise OSError(errno.EIO, f"{len(data)} of {end - start} bytes came")
        return [bytes(data) for data in found]


class _Packed(io.RawIOBase):
    """The file that a gzip lies in, for Python's gzip module."""

    def __init__(self, reader: SpanReader) -> None:
        self._reader = reader
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._reader.num_bytes}
        self._at = base[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._reader.fetch(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class GzipReader(SpanReader):
    """Reads a tar inside a gzip, forward; a damaged gzip ends where its damage begins."""

    window_bytes = 1 << 20
    is_gzip = True

    def __init__(self, packed: SpanReader) -> None:
        super().__init__()
        self._packed = packed
        self.num_bytes = packed.num_bytes
        self._stream = self._open()
        self._at = 0
        self._end: int | None = None
        self.damage: str | None = None

    def _open(self) -> gzip.GzipFile:
        return gzip.GzipFile(fileobj=io.BufferedReader(_Packed(self._packed), 1 << 20))

    def fetch(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes of the tar from `offset`."""
        if offset < self._at:
            self._stream, self._at = self._open(), 0
        while self._at < offset and self._forward(min(offset - self._at, 1 << 20)):
            pass
        parts = []
        while size > 0 and (part := self._forward(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _forward(self, size: int) -> bytes:
        if self._end is not None:
            size = min(size, self._end - self._at)
        if size <= 0:
            return b""
        try:
            part = self._stream.read1(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.damage = f"the gzip is damaged ({str(error).rstrip('.')})"
            part = b""
        if not part:
            self._end = self._at
        self._at += len(part)
        return part

    def reaches(self, position: int) -> bool:
        """Tell whether the tar has `position` bytes and more; reads it up to there."""
        if self._end is not None:
            return position <= self._end
        return position <= self._at or bool(self.read(position - 1, 1))

    def end(self) -> int:
        """Return the size of the tar in bytes, once all of it was read."""
        return self._at if self._end is None else self._end

    def fetch_packed(self, offset: int, size: int) -> bytes:
        """Return bytes of the gzip itself."""
        return self._packed.fetch(offset, size)

    def close(self) -> None:
        """Close the file."""
        self._packed.close()


def open_file(path: Path | str, storage: Storage | None = None) -> SpanReader:
    """Open a file by its path or URL, as it lies there."""
    return RemoteReader(str(path), storage) if is_url(path) else LocalReader(path)


def open_tar(path: Path | str, storage: Storage | None = None) -> SpanReader:
    """Open a tar by its path or URL; what its first bytes say is gzip is unpacked on the way."""
    reader = open_file(path, storage)
    try:
        return GzipReader(reader) if reader.fetch(0, 2) == GZIP_MAGIC else reader
    except BaseException:
        reader.close()
        raise
