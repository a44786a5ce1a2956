"""Scan one shard: read its tar headers, captions and image headers, and publish its index.

Every sample gets a row. One that cannot be used says why in `problem`, so that all that was read
is accounted for. No image is decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import DataError
from curation.image_header import IMAGE_EXTENSIONS, read_image_size
from curation.index import IndexInfo, read_index_info, table_of_rows, write_index
from curation.shards import (
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
_TEXT = frozenset({"txt"})
_JSON = frozenset({"json"})


@dataclass(frozen=True, kw_only=True)
class InputShard:
    """One tar to curate. `shard` is its path relative to the root of its source."""

    source: str
    shard: str
    path: Path
    index: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """Make the index of `input`, unless a good one is there."""

    input: InputShard
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS

    def __str__(self) -> str:
        return str(self.input)


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """What a scan found. `quarantined` says why nothing of the shard could be read."""

    info: IndexInfo
    index_digest: str = ""  # xxh3-128 of the index file
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
    """Make the index of one shard where it is missing or belongs to another state of the tar."""
    shard = task.input
    try:
        num_bytes = shard.path.stat().st_size
    except OSError as error:
        return _quarantined(task, 0, error.strerror or str(error))
    known = read_index_info(shard.index)
    if known is None or not _is_current(known, task, num_bytes):
        try:
            rows, info = _scan(task)
        except OSError as error:
            return _quarantined(task, num_bytes, error.strerror or str(error))
        if not rows and info.damage and "not a tar file" in info.damage:
            return _quarantined(task, num_bytes, info.damage)
        try:
            write_index(shard.index, table_of_rows(rows), info)
        except OSError as error:
            raise DataError(
                f"{shard.index}: the index cannot be written ({error.strerror}). "
                "Free some space, or where the tars are read-only set index_dir: to a folder."
            ) from None
        known = info
    digest = xxhash.xxh3_128_hexdigest(shard.index.read_bytes())
    return Scanned(info=known, index_digest=digest)


def _is_current(info: IndexInfo, task: ScanTask, num_bytes: int) -> bool:
    if info.num_bytes != num_bytes:
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


def _scan(task: ScanTask) -> tuple[list[dict[str, Any]], IndexInfo]:
    shard, damage = task.input, None
    grouper = SampleGrouper()
    found: dict[tuple[str, int], _Contents] = {}
    with SpanReader(shard.path) as reader:
        if reader.read(0, 2) == b"\x1f\x8b":
            raise DataError(
                f"{shard.path} is compressed (gzip), which cannot be read at random. "
                "Unpack it to a plain .tar first (gunzip); images do not shrink by it anyway."
            )
        try:
            for member in read_members(reader):
                sample = grouper.add(member)
                if sample is not None:
                    contents = found.setdefault((sample.key, sample.occurrence), _Contents())
                    contents.read(reader, sample, member, task.max_image_pixels)
        except TarDamageError as error:
            damage = str(error)
        num_bytes = reader.num_bytes
    rows = [
        found[sample.key, sample.occurrence].row(sample, shard, num_bytes)
        for sample in grouper.samples
    ]
    info = IndexInfo(
        source=shard.source,
        shard=shard.shard,
        num_bytes=num_bytes,
        num_samples=len(rows),
        unreadable=dict(sorted(Counter(r["problem"] for r in rows if r["problem"]).items())),
        ignored_members=grouper.num_ignored,
        damage=damage,
        max_image_pixels=task.max_image_pixels,
    )
    return rows, info


class _Contents:
    """What was read of one sample's members, in tar order, while the window is over them."""

    def __init__(self) -> None:
        self.image: tuple[str, Member] | None = None
        self.image_size: tuple[int, int] | None = None
        self.image_problem: str | None = "no image"
        self.texts: dict[str, tuple[str | None, str | None]] = {}  # ext -> (caption, problem)
        self.is_truncated = False

    def read(
        self, reader: SpanReader, sample: SampleMembers, member: Member, max_pixels: int
    ) -> None:
        """Read what the index needs of one member."""
        extension = sample.members[-1][0]
        if member.is_truncated:
            self.is_truncated = True
        elif extension in IMAGE_EXTENSIONS and self.image is None:
            self.image = (extension, member)
            self.image_size, self.image_problem = read_image_size(
                lambda n: reader.read(member.offset, min(n, member.size)), member.size, max_pixels
            )
        elif extension in _TEXT:
            self.texts["txt"] = _read_caption(reader, member)
        elif extension in _JSON:
            self.texts["json"] = _read_json_caption(reader, member)

    def row(self, sample: SampleMembers, shard: InputShard, num_bytes: int) -> dict[str, Any]:
        """Return the sample's row of the index."""
        caption, caption_problem = self.texts.get("txt") or self.texts.get(
            "json", (None, "no caption")
        )
        problem = "truncated" if self.is_truncated else self.image_problem or caption_problem
        extension, image = self.image or (None, None)
        width, height = self.image_size or (None, None)
        members = [member for _, member in sample.members]
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
            "problem": problem,
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
        caption.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as \\ud800
        return None, "caption not utf-8"
    return caption, None
