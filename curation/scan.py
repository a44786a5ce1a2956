"""Scan one shard: read its tar headers, captions and image headers, and publish its index.

Every sample gets a row. One that cannot be used says why in `problem`, so that all that was read
is accounted for. An image is read whole, or decoded, only where a rule needs it (columns.py).
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.errors import DataError, UsageError, did_you_mean
from curation.captions import DEFAULT_PLACES
from curation.columns import compute_columns, needs_image
from curation.index import (
    SCHEMA,
    IndexInfo,
    add_columns,
    digest_of_index,
    read_index_file,
    read_index_info,
    write_index,
)
from curation.lean import whole_imports
from curation.rows import RowBuilder
from curation.shards import TarDamageError, read_batches
from curation.spans import GzipReader, SpanReader, open_tar

DEFAULT_MAX_IMAGE_PIXELS = 100_000_000
# The tar is not there or is not ours to read. Any other failure is the storage's, and may pass.
_UNREADABLE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}
)


@dataclass(frozen=True, kw_only=True)
class InputShard:
    """One tar to curate. `shard` is its path relative to the root of its source."""

    source: str
    shard: str
    path: str  # absolute, or a URL
    index: Path
    storage: tuple[tuple[str, Any], ...] = ()  # options of the URL's file system

    def __post_init__(self) -> None:
        for path in (self.path, self.index):
            try:
                str(path).encode()
            except UnicodeEncodeError:
                name = os.fsencode(path).decode("utf-8", "backslashreplace")
                raise UsageError(
                    f"{name}: the path is not UTF-8, so that no index or manifest can hold it. "
                    "Rename it, or leave it out of the shards."
                ) from None

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """Make the index of `input`, unless a good one is there."""

    input: InputShard
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
    captions: tuple[str, ...] = DEFAULT_PLACES  # where they are (captions.py)
    columns: tuple[str, ...] = ()  # what the rules need besides (columns.py)
    scored: tuple[str, ...] = ()  # what they need that no scan makes (`pairmill score`)

    def __str__(self) -> str:
        return str(self.input)


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """What a scan found. `quarantined` says why nothing of the shard could be read."""

    info: IndexInfo
    index_digest: str = ""  # of what the job uses of the index (index.digest_of_index)
    quarantined: str | None = None

    @property
    def num_samples(self) -> int:
        """Samples read, unreadable ones included."""
        return self.info.num_samples


def scan_shard(task: ScanTask) -> Scanned:
    """Make the index of one shard where it is missing or belongs to another state of the tar.

    Raises:
        DataError: its storage fails, or the index cannot be written.
    """
    shard = task.input
    try:
        with open_tar(shard.path, dict(shard.storage)) as reader:
            known = read_index_info(shard.index)
            if known is not None and _is_current(known, task, reader):
                if not set(task.columns) <= set(known.columns):
                    known = _add_columns(task, reader, known)
                return _scanned(task, known)
            table, info = _scan(task, reader)
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in _UNREADABLE:
            return _quarantined(task, 0, why)
        raise DataError(
            f"{shard.path} cannot be read now ({why}). The storage failed, which says nothing of "
            "the tar: look at it, then run the same line again; what is done stays done."
        ) from None
    if not table.num_rows and info.damage and "not a tar file" in info.damage:
        return _quarantined(task, info.num_bytes, info.damage)
    with _writing_index(shard.index):
        info = write_index(shard.index, table, info)
    return _scanned(task, info)


def _scanned(task: ScanTask, info: IndexInfo) -> Scanned:
    lacking = [name for name in task.scored if name not in info.columns]
    if lacking:
        known = [*SCHEMA.names, *info.columns]
        raise UsageError(
            f"no column is called {lacking[0]!r}{did_you_mean(lacking[0], known)} A rule judges by "
            f"it, and {task.input.index} has: {', '.join(known)}. `pairmill score` adds score "
            "columns: run it on these shards first; json.KEY is a field of the sample's .json."
        )
    return Scanned(info=info, index_digest=digest_of_index(info, [*task.columns, *task.scored]))


@contextmanager
def _writing_index(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror}). "
            "Free some space, or where the tars are read-only set index_dir: to a folder."
        ) from None


def _add_columns(task: ScanTask, reader: SpanReader, info: IndexInfo) -> IndexInfo:
    """Add the columns that a good index lacks; all that it holds stays."""
    path = task.input.index
    lacking = [name for name in task.columns if name not in info.columns]
    made = compute_columns(reader, read_index_file(path, SCHEMA.names), lacking)
    with _writing_index(path):
        return add_columns(path, made, info)


def _is_current(info: IndexInfo, task: ScanTask, reader: SpanReader) -> bool:
    if info.num_bytes != reader.num_bytes or info.fingerprint != reader.fingerprint():
        return False
    if (
        info.plan is not None
    ):  # the index of a curated shard: its uids tell where its samples came from
        return True
    made_for = (info.source, info.shard, info.max_image_pixels, info.captions)
    shard = task.input
    return made_for == (shard.source, shard.shard, task.max_image_pixels, list(task.captions))


def _quarantined(task: ScanTask, num_bytes: int, why: str) -> Scanned:
    shard = task.input
    info = IndexInfo(
        source=shard.source, shard=shard.shard, num_bytes=num_bytes, num_samples=0, damage=why
    )
    return Scanned(info=info, quarantined=why)


@contextmanager
def _no_cycles() -> Iterator[None]:
    """Keep Python's search for cycles away: a scan makes none, and a fifth of its time would go."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _scan(task: ScanTask, reader: SpanReader) -> tuple[pa.Table, IndexInfo]:
    shard, damage = task.input, None
    with whole_imports():  # before the walk does, which may be cancelled
        importlib.import_module("curation.kernels")
    builder = RowBuilder(
        reader,
        source=shard.source,
        shard=shard.shard,
        places=task.captions,
        max_pixels=task.max_image_pixels,
        columns=task.columns,
    )
    with _no_cycles():
        try:
            of_image = set(filter(needs_image, task.columns))
            hashed = of_image == {"image_hash"}
            for batch in read_batches(reader, whole=bool(of_image) and not hashed, digests=hashed):
                builder.add(batch)
        except TarDamageError as error:
            damage = str(error)
            if isinstance(reader, GzipReader) and reader.damage:
                damage = f"{reader.damage}: {damage}"
        table = builder.table()
    ignored = builder.grouper.ignored
    info = IndexInfo(
        source=shard.source,
        shard=shard.shard,
        num_bytes=reader.num_bytes,
        num_samples=table.num_rows,
        unreadable=dict(sorted(builder.unreadable.items())),
        ignored_members=ignored.total(),
        ignored=dict(sorted(ignored.items())),
        repeated_keys=builder.num_repeated_keys,
        is_gzip=reader.is_gzip,
        damage=damage,
        max_image_pixels=task.max_image_pixels,
        captions=list(task.captions),
        fingerprint=reader.fingerprint(),
    )
    return table, info
