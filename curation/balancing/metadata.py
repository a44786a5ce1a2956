"""Load a metadata list: the entries that balancing counts (MetaCLIP calls them queries)."""

from __future__ import annotations

import gzip
import hashlib
import json
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
    """Return the sha256 of a metadata file."""
    return hashlib.sha256(read_bytes(Path(path))).hexdigest()


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
