"""Find the shards of a source: folders, globs and brace patterns become a list of tars."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import UsageError
from curation.index import index_path
from curation.scan import InputShard

_BRACES = re.compile(r"\{([^{}]*)\}")
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


def fixed_folder(pattern: str) -> str:
    """Return the folder that a pattern starts in, before its first wildcard or brace."""
    if os.path.isdir(pattern):
        return os.path.abspath(pattern)
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return os.path.abspath(os.path.dirname(fixed) or ".")


def find_shards(
    source: str, patterns: Sequence[str], *, index_dir: Path | None = None
) -> list[InputShard]:
    """Return the tars of one source, sorted, each once; a shard's name is relative to their root.

    The root is the folder that all patterns have in common, whatever matches them and in any order.

    Raises:
        UsageError: a pattern matches nothing, or something that is no tar.
    """
    paths = {path for pattern in patterns for path in _match(source, pattern)}
    root = os.path.commonpath([fixed_folder(pattern) for pattern in patterns])
    shards = []
    for path in sorted(paths):
        name = os.path.relpath(path, root)
        beside = index_path(path)
        index = beside if index_dir is None else index_dir / source / index_path(name)
        shards.append(InputShard(source=source, shard=name, path=Path(path), index=index))
    return shards


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
            f"source {source!r}: {path} is no shard: expected a name that ends in .tar. "
            "Rename it if it is a tar, else leave it out."
        )
    return [path]


def _match(source: str, pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        found = [str(p) for p in Path(pattern).rglob("*") if p.name.endswith(_ENDINGS)]
        found = [p for p in found if not os.path.basename(p).startswith(".") and _is_file(p)]
        expected = "a folder with .tar files in it"
    else:
        found, missing = [], []
        for path in expand_braces(pattern):
            matches = _match_files(source, path)
            (found.extend(matches) if matches else missing.append(path))
        if missing and found:
            raise UsageError(
                f"source {source!r}: {pattern!r} names {len(missing)} shards that are not there, "
                f"the first {missing[0]!r}. Restore them, or narrow the pattern."
            )
        expected = "a folder, a glob or a brace pattern of .tar files"
    if not found:
        raise UsageError(f"source {source!r}: nothing matches {pattern!r}. Expected {expected}.")
    packed = [path for path in found if path.endswith(_ENDINGS[1:])]
    if packed:
        raise UsageError(
            f"source {source!r}: {packed[0]} is compressed, which cannot be read at random. "
            "Unpack it to a plain .tar (gunzip); images do not shrink by it anyway."
        )
    return [os.path.abspath(path) for path in found]
