"""Find the shards of a source: folders, globs and brace patterns become a list of tars.

Local paths, and URLs of any storage that fsspec knows. The layouts of img2dataset, DataComp and
open_clip are all folders of tars; what else lies there (Parquet, statistics) is passed over.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from curation.index import index_path
from curation.scan import InputShard
from curation.spans import Storage, as_storage_error, file_system, is_url, open_file

_BRACES = re.compile(r"\{([^{}]*)\}")
_WILDCARD = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ENDINGS = (".tar", ".tar.gz", ".tgz")


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the texts that a pattern with {000..012} and {a,b} stands for, as a shell would."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    bounds = _RANGE.fullmatch(found[1])
    if bounds:
        low, high = bounds.groups()
        width = len(low) if low.startswith("0") else 0
        step = 1 if int(low) <= int(high) else -1
        choices: Sequence[str] = [
            str(n).zfill(width) for n in range(int(low), int(high) + step, step)
        ]
    else:
        choices = found[1].split(",")
    for choice in choices:
        for rest in expand_braces(after):
            yield before + choice + rest


def split_list(pattern: str) -> list[str]:
    """Split open_clip's way to write a list: `a/{0..9}.tar::b/{0..9}.tar`."""
    parts = pattern.split("::")
    # In a URL `::` chains file systems, and then no shard's name stands before it.
    if all(part.endswith(_ENDINGS) for part in parts[:-1]):
        return parts
    return [pattern]


def fixed_folder(pattern: str) -> str:
    """Return the folder that a pattern starts in, before its first wildcard or brace."""
    if is_url(pattern):
        if not pattern.endswith(_ENDINGS) and not _WILDCARD.search(pattern):
            return pattern.rstrip("/")
        return _WILDCARD.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    if os.path.isdir(pattern):
        return os.path.abspath(pattern)
    fixed = _WILDCARD.split(pattern, maxsplit=1)[0]
    return os.path.abspath(os.path.dirname(fixed) or ".")


def find_shards(
    source: str,
    patterns: Sequence[str],
    *,
    index_dir: Path | None = None,
    storage: Storage | None = None,
) -> list[InputShard]:
    """Return the tars of one source, sorted, each once; a shard's name is relative to their root.

    The root is the folder that all patterns have in common, whatever matches them and in any order.
    `index_dir` is where the indexes go; they lie beside local tars where it is None.

    Raises:
        UsageError: a pattern matches nothing, or something that is no tar.
    """
    patterns = [part for pattern in patterns for part in split_list(pattern)]
    folders = [fixed_folder(pattern) for pattern in patterns]
    if len({folder.partition("://")[0] if is_url(folder) else "" for folder in folders}) > 1:
        raise UsageError(
            f"source {source!r} mixes local paths and URLs, or URLs of two kinds: {folders}. "
            "Make two sources of them."
        )
    paths = {path for pattern in patterns for path in _match(source, pattern, storage or {})}
    root = os.path.commonpath([folder.replace("://", "/:/") for folder in folders])
    shards = []
    for path in sorted(paths):
        name = os.path.relpath(path.replace("://", "/:/"), root)
        if index_dir is None and is_url(path):
            raise UsageError(
                f"source {source!r}: the index of {path} needs a local folder. Set index_dir."
            )
        index = index_path(path) if index_dir is None else index_dir / source / index_path(name)
        options = tuple(sorted((storage or {}).items())) if is_url(path) else ()
        shards.append(
            InputShard(source=source, shard=name, path=path, index=index, storage=options)
        )
    return shards


def num_bytes_of(shard: InputShard) -> int:
    """Return the size of a shard in bytes, as it lies there; 0 where it is not there."""
    try:
        with open_file(shard.path, dict(shard.storage)) as reader:
            return reader.num_bytes
    except OSError:
        return 0


def _is_file(path: str) -> bool:
    # A link that leads nowhere is a shard that cannot be read, not one that was never there.
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _match_files(source: str, path: str) -> list[str]:
    """Return the tars that a file's name or a glob means; a glob passes over other files."""
    if not os.path.isfile(path):
        found = glob.glob(path, recursive=True)
        return [p for p in found if p.endswith(_ENDINGS) and _is_file(p)]
    if not path.endswith(_ENDINGS):
        raise UsageError(
            f"source {source!r}: {path} is no shard: expected a name that ends in "
            f"{', '.join(_ENDINGS)}. Rename it if it is a tar, else leave it out."
        )
    return [path]


def _match(source: str, pattern: str, storage: Storage) -> list[str]:
    if pattern.startswith("pipe:"):
        raise UsageError(
            f"source {source!r}: {pattern!r} is a command, whose output cannot be read by ranges. "
            "Give what it reads itself: a path, or a URL such as s3://bucket/{0000..0099}.tar."
        )
    if is_url(pattern):
        return _match_remote(source, pattern, storage)
    if os.path.isdir(pattern):
        found = [str(p) for p in Path(pattern).rglob("*") if p.name.endswith(_ENDINGS)]
        found = [p for p in found if not os.path.basename(p).startswith(".") and _is_file(p)]
        expected = "a folder with .tar files in it"
    else:
        found, missing = [], []
        for path in expand_braces(pattern):
            matches = _match_files(source, path)
            (found.extend(matches) if matches else missing.append(path))
        _refuse_missing(source, pattern, found, missing)
        expected = "a folder, a glob or a brace pattern of .tar files"
    if not found:
        raise UsageError(f"source {source!r}: nothing matches {pattern!r}. Expected {expected}.")
    return [os.path.abspath(path) for path in found]


def _refuse_missing(source: str, pattern: str, found: list[str], missing: list[str]) -> None:
    if missing and found:
        raise UsageError(
            f"source {source!r}: {pattern!r} names {len(missing)} shards that are not there, "
            f"the first {missing[0]!r}. Restore them, or narrow the pattern."
        )


def _match_remote(source: str, pattern: str, storage: Storage) -> list[str]:
    """Return the URLs of the tars that a pattern of remote storage means."""
    system, _ = file_system(pattern, storage)
    protocol = pattern.partition("://")[0]
    found: list[str] = []
    missing: list[str] = []
    listed: dict[str, set[str]] = {}
    try:
        for url in expand_braces(pattern):
            if _WILDCARD.search(url):
                matches = system.glob(url)
            elif not url.endswith(_ENDINGS):
                matches = system.find(url)
            else:
                folder = url.rpartition("/")[0]
                if folder not in listed:
                    listed[folder] = _names_in(system, folder)
                is_there = not listed[folder] or url.rpartition("/")[2] in listed[folder]
                matches = [url] if is_there else []
            tars = [system.unstrip_protocol(p) if not is_url(p) else p for p in matches]
            tars = [p for p in tars if p.endswith(_ENDINGS)]
            (found.extend(tars) if tars else missing.append(url))
    except Exception as error:  # each file system has its own
        why = as_storage_error(error)
        raise UsageError(
            f"source {source!r}: {pattern!r} cannot be listed ({why.strerror}). Look at the URL, "
            "the credentials, and the source's storage_options (endpoint_url, anon, ...)."
        ) from None
    _refuse_missing(source, pattern, found, missing)
    if not found:
        raise UsageError(
            f"source {source!r}: nothing matches {pattern!r}. Expected a folder, a glob or a brace "
            f"pattern of .tar files in {protocol}://."
        )
    return found


def _names_in(system: Any, folder: str) -> set[str]:
    """Return the names in a remote folder; none where its storage keeps no lists (https)."""
    try:
        return {str(path).rstrip("/").rpartition("/")[2] for path in system.ls(folder, False)}
    except FileNotFoundError:
        return {""}
