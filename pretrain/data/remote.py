"""Remote files as local ones: fetched by fsspec into a cache folder that the processes of a node
share, within a size cap.

The protocol is files and flock alone, so it needs no server and survives kills:

- `NAME.part` is being fetched; its writer holds an exclusive lock. Without that lock its writer is
  dead, and it is removed. It has its full size from the start: room is reserved, not hoped for.
- `NAME` is whole (renamed into place). A process that reads it holds a shared lock; what nobody
  reads may be evicted, least recently used first.
- `.lock` is held while room is made, for milliseconds.

Where the cap leaves no room (everything in the cache is being read), `open` returns None, and the
caller reads byte ranges from the remote file instead: slower, but never a deadlock, never above the
cap. Failed reads are retried with growing pauses; what was fetched before is kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError

_PART_BYTES = 8 << 20  # of one ranged request
_POLL_SECONDS = 0.02
_MAX_PAUSE_SECONDS = 30.0


def is_remote(location: str) -> bool:
    """Return whether a location is a URL that fsspec opens (s3://..., https://..., file://...)."""
    return "://" in location


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Where copies of remote files lie on this node, how many bytes of them, and how patiently they
    are fetched.
    """

    folder: Path
    max_bytes: int
    retries: int = 8
    num_threads: int = 4  # that fetch ahead, in each worker


class RemoteFiles:
    """Reads byte ranges of remote files, with retries; made once a process."""

    def __init__(self, *, retries: int, pause: float = 0.5) -> None:
        self._retries = retries
        self._pause = pause
        self._filesystems: dict[str, Any] = {}

    def _filesystem(self, url: str) -> Any:
        protocol = url.partition("://")[0]
        if protocol not in self._filesystems:
            import fsspec

            try:
                # Listings are not cached: a file's size is asked for when it matters.
                self._filesystems[protocol], _ = fsspec.core.url_to_fs(
                    url, use_listings_cache=False
                )
            except (ImportError, ValueError) as error:
                raise DataError(
                    f"{url}: fsspec cannot open {protocol}:// here ({error}). "
                    "Install what it names (for S3: pip install 'pairmill[remote]')."
                ) from None
        return self._filesystems[protocol]

    def _patiently(self, url: str, what: str, action: Any) -> Any:
        """Return action(); retry what may be transient, raise DataError in the end."""
        for attempt in range(self._retries + 1):
            try:
                return action()
            except (FileNotFoundError, PermissionError) as error:
                raise DataError(
                    f"{url}: {type(error).__name__} ({error}); the dataset names it. "
                    "Check the path and the credentials in the environment."
                ) from None
            except DataError:
                raise
            except Exception as error:  # every file system raises its own
                if attempt == self._retries:
                    raise DataError(
                        f"{url}: {what} failed {attempt + 1} times, the last time with "
                        f"{type(error).__name__}: {error}. Check the storage and the network, or "
                        "raise data.remote.retries."
                    ) from None
                time.sleep(min(self._pause * 2**attempt, _MAX_PAUSE_SECONDS))

    def size(self, url: str) -> int:
        """Return the bytes of a remote file."""
        filesystem = self._filesystem(url)
        return int(self._patiently(url, "asking its size", lambda: filesystem.info(url)["size"]))

    def read(self, url: str, start: int, size: int) -> bytes:
        """Return `size` bytes from `start`; raise DataError where they are not to be had."""
        filesystem = self._filesystem(url)

        def action() -> bytes:
            data: bytes = filesystem.cat_file(url, start=start, end=start + size)
            if len(data) != size:
                raise OSError(f"got {len(data)} of {size} bytes at {start}")
            return data

        data: bytes = self._patiently(url, "reading", action) if size else b""
        return data


class Cache:
    """Whole local copies of remote files in one folder; see the module for the protocol."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.folder = plan.folder
        self.max_bytes = plan.max_bytes
        self.files = RemoteFiles(retries=plan.retries)
        self._warned = False

    def path(self, url: str) -> Path:
        """Return where the copy of a remote file lies."""
        name = url.rpartition("/")[2]
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"

    def open(self, url: str, num_bytes: int | None = None, *, wait: bool = True) -> int | None:
        """Return a descriptor of the whole copy, fetched where it is not there.

        Without `wait` (fetching ahead), what another process is fetching is left to it. None: being
        fetched by another, or no room within the cap.

        Raises DataError: it cannot be fetched, or has not `num_bytes` bytes.
        """
        path = self.path(url)
        while True:
            ready = self._open_ready(path, num_bytes)
            if ready is not None:
                return ready
            if num_bytes is None:
                num_bytes = self.files.size(url)
            part = self._claim(path, num_bytes)
            if isinstance(part, int):
                return self._fetch(url, path, part, num_bytes)
            if not wait:
                return None
            if part == "full":
                self._warn_full(num_bytes)
                return None
            time.sleep(_POLL_SECONDS)

    def touch(self, url: str) -> None:
        """Mark a copy as just used, so that it is not the first to be evicted."""
        with suppress(OSError):
            os.utime(self.path(url))

    def _warn_full(self, num_bytes: int) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"WARNING: {self.folder} has no room for {num_bytes:,} bytes within "
                f"data.remote.cache_bytes = {self.max_bytes:,}: all of it is being read. Reading "
                "from remote storage sample by sample meanwhile, which is slow; raise it.",
                file=sys.stderr,
                flush=True,
            )

    def _open_ready(self, path: Path, num_bytes: int | None) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink and num_bytes in (None, status.st_size):
                os.utime(path)
                return descriptor
            if status.st_nlink:  # of another size: an older file of that name
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # evicted between two lines
            pass
        os.close(descriptor)
        return None

    def _claim(self, path: Path, num_bytes: int) -> int | str:
        """Return a descriptor of a new locked part with room for all of it, or "busy" or "full"."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() or (part.exists() and not _remove_unlocked(part)):
                return "busy"
            if not self._make_room(num_bytes):
                return "full"
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, num_bytes)
            return descriptor

    def _make_room(self, num_bytes: int) -> bool:
        entries = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + num_bytes <= self.max_bytes:
                break
            if path.name != ".lock" and _remove_unlocked(path):
                total -= size
        return total + num_bytes <= self.max_bytes

    def _fetch(self, url: str, path: Path, descriptor: int, num_bytes: int) -> int:
        part = path.with_name(path.name + ".part")
        try:
            size = self.files.size(url)
            if size != num_bytes:
                raise DataError(
                    f"{url}: has {size:,} bytes, {num_bytes:,} were expected; it was cut or "
                    "changed since. Restore it, or make the dataset again."
                )
            for start in range(0, num_bytes, _PART_BYTES):
                data = self.files.read(url, start, min(_PART_BYTES, num_bytes - start))
                os.pwrite(descriptor, data, start)
            part.rename(path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return descriptor
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(descriptor)
            raise


def _remove_unlocked(path: Path) -> bool:
    """Remove a file of the cache unless a process holds a lock on it; return whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


class FetchAhead:
    """Daemon threads that fill the cache with what will be read next.

    A file that cannot be fetched is left to the reader, which will say so.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._num_threads = cache.plan.num_threads
        self._wanted: queue.SimpleQueue[tuple[str, int | None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def ask(self, files: Iterable[tuple[str, int | None]]) -> None:
        """Ask for files (URL, bytes) in their order of importance."""
        for file in files:
            self._wanted.put(file)
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._work, name="fetch-ahead", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            url, num_bytes = self._wanted.get()
            with suppress(DataError, OSError):
                descriptor = self._cache.open(url, num_bytes, wait=False)
                if descriptor is not None:
                    os.close(descriptor)
