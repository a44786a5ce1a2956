"""A second copy of a run's checkpoints on any storage that fsspec reaches.

Copied after publication, in the background; `checkpoint.json` goes last, so that a folder without
it is half a copy and no checkpoint. Every file is read back and its digest compared. What has
failed is tried again with the next checkpoint, loudly. A run whose own folder is empty is restored
from here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import CheckpointError, DataError
from configs.publish import published_folder
from pretrain import checkpoint
from pretrain.config import IntervalConfig

_CHUNK_BYTES = 8 << 20
_RECORD = "checkpoint.json"


class Mirror:
    """The remote copies of one run; rank 0 alone has one."""

    def __init__(self, url: str, intervals: IntervalConfig) -> None:
        self._url = url.rstrip("/")
        self._intervals = intervals
        self._filesystem, self._root = _open(self._url)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._again = False
        self.copying: set[str] = set()  # what must not be removed here now

    def push(self, checkpoints: Path) -> None:
        """Copy what is new in the background; a copy that is under way goes on to it."""
        with self._lock:
            self.copying |= {folder.name for folder in checkpoint.usable_checkpoints(checkpoints)}
            self._again = True
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, args=(checkpoints,), name="mirror", daemon=True
                )
                self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being copied."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self, checkpoints: Path) -> None:
        while True:
            with self._lock:
                if not self._again:
                    self.copying.clear()
                    self._thread = None
                    return
                self._again = False
            self._push(checkpoints)

    def _push(self, checkpoints: Path) -> None:
        try:
            there = set(self.names())
            for folder in reversed(checkpoint.usable_checkpoints(checkpoints)):
                if folder.name not in there:
                    self._copy(folder)
            names = self.names()
            self._filesystem.pipe_file(f"{self._root}/{checkpoint.LATEST}", _line(max(names)))
            keep, every = self._intervals.keep_checkpoints, self._intervals.keep_every_samples
            for name in checkpoint.superseded(names, keep=keep, keep_every=every):
                self._filesystem.rm_file(f"{self._root}/{name}/{_RECORD}")  # no checkpoint any more
                self._filesystem.rm(f"{self._root}/{name}", recursive=True)
        except Exception as error:  # every file system raises its own
            print(
                f"WARNING: the copy of the checkpoints to {self._url} failed "
                f"({type(error).__name__}: {error}). Training goes on; it is tried again with the "
                "next checkpoint.",
                file=sys.stderr,
                flush=True,
            )

    def names(self) -> list[str]:
        """Return the names of the whole copies, oldest first."""
        self._filesystem.invalidate_cache()
        found = self._filesystem.glob(f"{self._root}/samples-*/{_RECORD}")
        return sorted(path.rsplit("/", 2)[1] for path in found)

    def _copy(self, folder: Path) -> None:
        record = checkpoint.read_record(folder, verify=False)
        target = f"{self._root}/{folder.name}"
        for name, written in record.files.items():
            self._filesystem.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
            self._filesystem.put_file(str(folder / name), f"{target}/{name}")
            if self._digest(f"{target}/{name}") != written:
                raise OSError(f"{target}/{name} is not what was sent")
        self._filesystem.put_file(str(folder / _RECORD), f"{target}/{_RECORD}")

    def _digest(self, path: str) -> str:
        state = xxhash.xxh3_128()
        for chunk in self._chunks(path):
            state.update(chunk)
        return f"xxh3-128:{state.hexdigest()}"

    def _chunks(self, path: str) -> Iterator[bytes]:
        with self._filesystem.open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def restore(self, checkpoints: Path) -> Path | None:
        """Fetch the newest sound copy into an empty folder of checkpoints; None: there is none.

        A damaged copy is passed over, loudly. Raises CheckpointError where all are damaged, or the
        storage cannot be read.
        """
        try:
            names = self.names()
        except Exception as error:  # every file system raises its own
            raise CheckpointError(
                f"checkpoint.remote {self._url} cannot be read ({type(error).__name__}: {error}). "
                "Mend that, or unset it to start from the beginning."
            ) from None
        for name in reversed(names):
            print(f"fetching {self._url}/{name}: {checkpoints} has none", file=sys.stderr)
            try:
                with published_folder(checkpoints / name) as temporary:
                    self._fetch(name, temporary)
            except CheckpointError as error:
                print(f"WARNING: {error} Taking the copy before it.", file=sys.stderr)
                continue
            return checkpoints / name
        if names:
            raise CheckpointError(f"none of the {len(names)} copies in {self._url} is sound.")
        return None

    def _fetch(self, name: str, folder: Path) -> None:
        source = f"{self._root}/{name}"
        (folder / _RECORD).write_bytes(self._filesystem.cat_file(f"{source}/{_RECORD}"))
        for file in checkpoint.read_record(folder, verify=False).files:
            target = (folder / file).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise CheckpointError(f"{self._url}/{name} names a file outside itself: {file}.")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(target, "wb") as out:
                    out.writelines(self._chunks(f"{source}/{file}"))
            except FileNotFoundError:
                continue  # said by the check
        checkpoint.read_record(folder)


def _line(name: str) -> bytes:
    return f"{name}\n".encode()


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"checkpoint.remote {url}: fsspec cannot open it here ({error}). Install what it names "
            "(for S3: pip install 'pairmill[remote]')."
        ) from None
    return filesystem, str(root)
