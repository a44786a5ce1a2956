"""Done is a file renamed into place: write to a temporary name, flush to disk, then rename.

A reader therefore never sees half a file, and a rerun tells done from not done by existence alone.
The temporary name stands in the same folder (rename is atomic within one file system only) and
carries ".tmp-", so that left-overs of a killed run can be told apart and removed.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_MARK = ".tmp-"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def published_file(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file for writing; on a clean exit flush it and rename it to `path`.

    On an exception nothing is published and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def published_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder; on a clean exit flush its files and rename it to `path`.

    `path` must not exist. On an exception nothing is published and the temporary folder is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush a finished temporary folder and rename it to `path`, which must not exist."""
    for file in sorted(temporary.rglob("*")):
        if file.is_dir():
            fsync_folder(file)
        else:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    fsync_folder(temporary)
    os.rename(temporary, path)
    fsync_folder(path.parent)


def publish_text(path: Path | str, text: str) -> None:
    """Publish `text` as UTF-8 at `path`."""
    with published_file(path, "w") as file:
        file.write(text)


def remove_leftovers(folder: Path | str) -> list[Path]:
    """Remove the temporary files and folders that killed runs left directly in `folder`."""
    removed = []
    for entry in sorted(Path(folder).glob(f".*{_MARK}*")):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        removed.append(entry)
    return removed
