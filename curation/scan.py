"""Scan one shard: read its tar headers, captions and image headers, and publish its index.

Every sample gets a row. One that cannot be used says why in `problem`, so that all that was read
is accounted for. An image is read whole, or decoded, only where a rule needs it (columns.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.errors import DataError, UsageError
from curation.columns import compute_columns
from curation.image_header import read_image_size
from curation.index import (
    SCHEMA,
    IndexInfo,
    digest_of_index,
    fingerprint_of,
    read_index_file,
    read_index_info,
    table_of_rows,
    write_index,
)
from curation.shards import (
    IMAGE_EXTENSIONS,
    Member,
    SampleGrouper,
    SampleMembers,
    SpanReader,
    TarDamageError,
    read_members,
)

DEFAULT_MAX_IMAGE_PIXELS = 100_000_000
# A caption or a JSON beyond these is an attack or a mistake, and must not fill a worker's memory.
MAX_CAPTION_BYTES = 1 << 20
MAX_JSON_BYTES = 16 << 20
# Of all captions of a shard.
MAX_SHARD_CAPTION_BYTES = 256 << 20
# The tar is not there or is not ours to read. Any other failure is the storage's, and may pass.
_UNREADABLE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}
)


@dataclass(frozen=True, kw_only=True)
class InputShard:
    """One tar to curate. `shard` is its path relative to the root of its source."""

    source: str
    shard: str
    path: Path
    index: Path

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
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """Make the index of `input`, unless a good one is there."""

    input: InputShard
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
    columns: tuple[str, ...] = ()  # what the rules need besides (columns.py)

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


def uid_of(source: str, shard: str, key: str, occurrence: int) -> bytes:
    """Return the 128-bit identity of a sample (docs/formats.md, `uid`)."""
    text = f"{source}\0{shard}\0{key}\0{occurrence}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def scan_shard(task: ScanTask) -> Scanned:
    """Make the index of one shard where it is missing or belongs to another state of the tar.

    Raises:
        DataError: its storage fails, or the index cannot be written.
    """
    shard = task.input
    try:
        with SpanReader(shard.path) as reader:
            known = read_index_info(shard.index)
            if known is not None and _is_current(known, task, reader):
                if not set(task.columns) <= set(known.columns):
                    known = _add_columns(task, reader, known)
                return Scanned(info=known, index_digest=digest_of_index(known, task.columns))
            rows, info = _scan(task, reader)
            table = table_of_rows(rows)
            for name, column in compute_columns(reader, table, task.columns).items():
                table = table.append_column(name, column)
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in _UNREADABLE:
            return _quarantined(task, 0, why)
        raise DataError(
            f"{shard.path} cannot be read now ({why}). The storage failed, which says nothing of "
            "the tar: look at it, then run the same line again; what is done stays done."
        ) from None
    if not rows and info.damage and "not a tar file" in info.damage:
        return _quarantined(task, info.num_bytes, info.damage)
    info = _publish(shard.index, table, info)
    return Scanned(info=info, index_digest=digest_of_index(info, task.columns))


def _publish(path: Path, table: pa.Table, info: IndexInfo) -> IndexInfo:
    try:
        return write_index(path, table, info)
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror}). "
            "Free some space, or where the tars are read-only set index_dir: to a folder."
        ) from None


def _add_columns(task: ScanTask, reader: SpanReader, info: IndexInfo) -> IndexInfo:
    """Add the columns that a good index lacks; all that it holds stays."""
    table = read_index_file(task.input.index)
    base = table.select(SCHEMA.names).cast(SCHEMA)  # Parquet names the items of a list otherwise
    for name in info.columns:
        base = base.append_column(name, table[name])
    table = base
    lacking = [name for name in task.columns if name not in info.columns]
    for name, column in compute_columns(reader, table, lacking).items():
        table = table.append_column(name, column)
    return _publish(task.input.index, table, info)


def _is_current(info: IndexInfo, task: ScanTask, reader: SpanReader) -> bool:
    if info.num_bytes != reader.num_bytes or info.fingerprint != fingerprint_of(reader):
        return False
    if (
        info.plan is not None
    ):  # the index of a curated shard: its uids tell where its samples came from
        return True
    made_for = (info.source, info.shard, info.max_image_pixels)
    return made_for == (task.input.source, task.input.shard, task.max_image_pixels)


def _quarantined(task: ScanTask, num_bytes: int, why: str) -> Scanned:
    shard = task.input
    info = IndexInfo(
        source=shard.source, shard=shard.shard, num_bytes=num_bytes, num_samples=0, damage=why
    )
    return Scanned(info=info, quarantined=why)


def _scan(task: ScanTask, reader: SpanReader) -> tuple[list[dict[str, Any]], IndexInfo]:
    shard, damage = task.input, None
    if reader.read(0, 2) == b"\x1f\x8b":
        raise DataError(
            f"{shard.path} is compressed (gzip), which cannot be read at random. "
            "Unpack it to a plain .tar first (gunzip); images do not shrink by it anyway."
        )
    grouper = SampleGrouper()
    contents = _Contents(reader, task.max_image_pixels)
    try:
        for member in read_members(reader):
            extension = grouper.add(member)
            if extension is not None:
                contents.read(extension, member)
    except TarDamageError as error:
        damage = str(error)
    rows = [contents.row(sample, shard) for sample in grouper.finish()]
    info = IndexInfo(
        source=shard.source,
        shard=shard.shard,
        num_bytes=reader.num_bytes,
        num_samples=len(rows),
        unreadable=dict(sorted(Counter(r["problem"] for r in rows if r["problem"]).items())),
        ignored_members=grouper.num_ignored,
        damage=damage,
        max_image_pixels=task.max_image_pixels,
        fingerprint=fingerprint_of(reader),
    )
    return rows, info


class _Contents:
    """What was read of the members of a shard, each while the reader's window is over it."""

    def __init__(self, reader: SpanReader, max_pixels: int) -> None:
        self._reader = reader
        self._max_pixels = max_pixels
        self._captions_left = MAX_SHARD_CAPTION_BYTES
        # Start of the member -> (size in pixels or caption, problem).
        self._sizes: dict[int, tuple[tuple[int, int] | None, str | None]] = {}
        self._texts: dict[int, tuple[str | None, str | None]] = {}

    def read(self, extension: str, member: Member) -> None:
        """Read what the index needs of one member."""
        if member.is_truncated:
            return
        if extension in IMAGE_EXTENSIONS:
            self._sizes[member.start] = read_image_size(
                lambda n: self._reader.read(member.offset, min(n, member.size)),
                member.size,
                self._max_pixels,
            )
        elif extension in ("txt", "json"):
            read = _read_caption if extension == "txt" else _read_json_caption
            caption, problem = read(self._reader, member)
            # A character takes up to four bytes, which is near enough for a budget.
            self._captions_left -= len(caption or "")
            if self._captions_left < 0:
                caption, problem = None, "caption too long"
            self._texts[member.start] = caption, problem

    def row(self, sample: SampleMembers, shard: InputShard) -> dict[str, Any]:
        """Return a sample's row of the index."""
        whole = [(ext, member) for ext, member in sample.members if not member.is_truncated]
        extension, image = next((m for m in whole if m[0] in IMAGE_EXTENSIONS), (None, None))
        size, problem = self._sizes[image.start] if image else (None, "no image")
        texts = {ext: self._texts[m.start] for ext, m in whole if m.start in self._texts}
        caption, caption_problem = texts.get("txt") or texts.get("json", (None, "no caption"))
        is_truncated = len(whole) < len(sample.members)
        width, height = size or (None, None)
        members = [member for _, member in sample.members]
        num_bytes = self._reader.num_bytes
        return {
            "uid": uid_of(shard.source, shard.shard, sample.key, sample.occurrence),
            "key": sample.key,
            "caption": caption,
            "image_ext": extension,
            "image_offset": image and image.offset,
            "image_size": image and image.size,
            "width": width,
            "height": height,
            "member_ext": [ext for ext, _ in sample.members],
            "member_start": [member.start for member in members],
            "member_offset": [member.offset for member in members],
            "member_size": [min(member.size, num_bytes - member.offset) for member in members],
            "problem": "truncated" if is_truncated else problem or caption_problem,
        }


def _read_caption(reader: SpanReader, member: Member) -> tuple[str | None, str | None]:
    if member.size > MAX_CAPTION_BYTES:
        return None, "caption too long"
    try:
        return reader.read(member.offset, member.size).decode(), None
    except UnicodeDecodeError:
        return None, "caption not utf-8"


def _read_json_caption(reader: SpanReader, member: Member) -> tuple[str | None, str | None]:
    """Return the `caption` of a JSON. A broken one matters only where no .txt has the caption."""
    if member.size > MAX_JSON_BYTES:
        return None, "bad json"
    try:
        content = json.loads(reader.read(member.offset, member.size))
    except (ValueError, RecursionError):
        return None, "bad json"
    caption = content.get("caption") if isinstance(content, dict) else None
    if not isinstance(caption, str):
        return None, "no caption" if isinstance(content, dict) else "bad json"
    try:
        if len(caption.encode()) > MAX_CAPTION_BYTES:
            return None, "caption too long"
    except UnicodeEncodeError:  # half of a surrogate pair, written as \\ud800
        return None, "caption not utf-8"
    return caption, None
