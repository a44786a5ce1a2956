"""Load a metadata list: the entries that balancing counts (MetaCLIP calls them queries)."""

from __future__ import annotations

import gzip
import hashlib
import json
from functools import lru_cache
from pathlib import Path

from configs.errors import DataError, UsageError


def read_bytes(path: Path) -> bytes:
    """Return the content of a metadata file, or raise UsageError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"metadata {str(path)!r} cannot be read ({error.strerror}). Expected a .json list or a "
            ".txt with one entry a line, each also with .gz behind."
        ) from None


def metadata_digest(path: Path | str) -> str:
    """Return the sha256 of a metadata file, or of the names and contents of a folder of them."""
    path = Path(path)
    if path.is_dir():
        files = sorted(find_languages(path).values())
        lines = [f"{file.name}\0{_digest(file, _state(file))}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    return _digest(path, _state(path))


def _state(path: Path) -> tuple[int, int, int]:
    """Return what changes with the content of a file, or (0, 0, 0) where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


# A job asks several times, and lists of all languages are half a gigabyte.
@lru_cache(maxsize=1024)
def _digest(path: Path, state: tuple[int, int, int]) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def find_languages(folder: Path) -> dict[str, Path]:
    """Return the metadata lists of a folder: language (the name up to the first dot) -> file.

    Raises:
        UsageError: it is no folder, has no list, or two of one language.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name, _, kind = path.name.partition(".")
        if name and kind in ("json", "txt", "json.gz", "txt.gz"):
            if name in found:
                raise UsageError(f"{folder} has two lists of {name!r}: {found[name]}, {path}.")
            found[name] = path
    if not found:
        raise UsageError(
            f"metadata {str(folder)!r} is not a folder of metadata lists. Expected "
            "LANGUAGE.json or LANGUAGE.txt, also with .gz behind; `python -m tools.build_metadata` "
            "makes one."
        )
    return found


def load_metadata(path: Path | str) -> list[str]:
    """Return the entries of a metadata file, in its order; an entry's id is its position.

    `.json`: a list of strings. `.txt`: one entry a line, blank lines left out. Each may end in
    `.gz`. Case and inner spaces are kept.

    Raises:
        UsageError: the file is not there. DataError: it is not such a list, is empty, or repeats
        one.
    """
    path = Path(path)
    data = read_bytes(path)
    kinds = [s for s in path.suffixes[-2:] if s != ".gz"]
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
        if kinds and kinds[-1] == ".json":
            entries = json.loads(text)
        else:
            entries = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"metadata {path} cannot be read: {error}.") from None
    if not isinstance(entries, list) or not all(isinstance(e, str) and e for e in entries):
        raise DataError(f"metadata {path}: expected a list of non-empty strings.")
    if not entries:
        raise DataError(f"metadata {path} has no entries; every sample would be dropped.")
    if len(set(entries)) < len(entries):
        seen: set[str] = set()
        twice = next(e for e in entries if e in seen or seen.add(e))  # type: ignore[func-returns-value]
        raise DataError(f"metadata {path} has {twice!r} more than once. Entries must be unique.")
    return entries
