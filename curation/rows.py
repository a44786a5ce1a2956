"""Make the rows of an index from the members of a tar, column by column, while it is read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.captions import TOO_LONG, CaptionFinder
from curation.columns import columns_of, find_values, needs_image, needs_json
from curation.grouping import SampleGrouper, SampleMembers, is_image
from curation.image_header import quick_size, read_image_size
from curation.index import SCHEMA
from curation.shards import Batch
from curation.spans import SpanReader

# Of all captions of a shard, in characters.
MAX_SHARD_CAPTIONS = 256 << 20
# Texts and JSONs are kept until their sample is whole; larger ones are read again.
_MAX_KEPT_BYTES = 64 << 10
_MAX_KEPT_SHARD_BYTES = 64 << 20
_PREFIX_BYTES = 4096

Size = tuple[tuple[int, int] | None, str | None]


class RowBuilder:
    """Takes the members of one tar and returns its samples as a table (index.SCHEMA)."""

    def __init__(
        self,
        reader: SpanReader,
        *,
        source: str,
        shard: str,
        places: Sequence[str],
        max_pixels: int,
        columns: Sequence[str] = (),
    ) -> None:
        self.grouper = SampleGrouper()
        self.unreadable: Counter[str] = Counter()
        self.num_repeated_keys = 0
        self._reader = reader
        self._uid = hashlib.blake2b(f"{source}\0{shard}\0".encode(), digest_size=16)
        self._finder = CaptionFinder(places)
        self._max_pixels = max_pixels
        self._columns = tuple(sorted(columns))
        self._of_image = tuple(name for name in self._columns if needs_image(name))
        self._of_json = tuple(name for name in self._columns if needs_json(name))
        self._kept_extensions = self._finder.extensions | ({"json"} if self._of_json else set())
        self._captions_left = MAX_SHARD_CAPTIONS
        self._bytes_left = _MAX_KEPT_SHARD_BYTES
        # By number of the member.
        self._starts: list[int] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._truncated: int | None = None
        self._kept: dict[int, bytes] = {}
        self._images: dict[int, Size] = {}
        self._values: dict[int, dict[str, Any]] = {}

    def add(self, batch: Batch) -> None:
        """Add members, and read what the index needs of them."""
        first = len(self._starts)
        extensions = self.grouper.add_batch(batch)
        self._starts += batch.starts
        self._offsets += batch.offsets
        self._sizes += batch.sizes
        if batch.is_last_truncated:
            self._truncated = len(self._starts) - 1
        kept, data = self._kept_extensions, batch.data
        for row, extension in enumerate(extensions):
            if extension is None or first + row == self._truncated:
                continue
            position, size = batch.positions[row], batch.sizes[row]
            if extension in kept:
                if size <= _MAX_KEPT_BYTES and size <= self._bytes_left:
                    is_here = position + size <= batch.limits[row]
                    content = bytes(data[position : position + size]) if is_here else None
                    if content is None:
                        content = self._reader.read(batch.offsets[row], size)
                    self._kept[first + row] = content
                    self._bytes_left -= size
            elif is_image(extension):
                self._add_image(batch, row, first + row)

    def _add_image(self, batch: Batch, row: int, number: int) -> None:
        position, size = batch.positions[row], batch.sizes[row]
        limit = min(position + min(size, _PREFIX_BYTES), batch.limits[row])
        found = quick_size(batch.data[position:limit]) if limit > position else None
        if found is None:
            self._images[number] = read_image_size(
                lambda n: self._content(batch, row, n), size, self._max_pixels
            )
        else:
            is_bomb = found[0] * found[1] > self._max_pixels
            self._images[number] = found, "too many pixels" if is_bomb else None
        if self._of_image and self._images[number][1] is None:
            if position + size <= batch.limits[row]:
                with memoryview(batch.data)[position : position + size] as view:
                    self._values[number] = find_values(view, self._of_image)
            else:
                whole = self._reader.read(batch.offsets[row], size)
                self._values[number] = find_values(whole, self._of_image)

    def _content(self, batch: Batch, row: int, num_bytes: int) -> bytes:
        """Return the first bytes of a member."""
        num_bytes = min(num_bytes, batch.sizes[row])
        position = batch.positions[row]
        if position + num_bytes <= batch.limits[row]:
            return bytes(batch.data[position : position + num_bytes])
        return self._reader.read(batch.offsets[row], num_bytes)

    def _kept_content(self, number: int, num_bytes: int) -> bytes:
        kept = self._kept.get(number)
        if kept is None:
            kept = self._reader.read(self._offsets[number], num_bytes)
        return kept

    def table(self) -> pa.Table:
        """Return the samples of all members added."""
        samples = self.grouper.finish()
        self.num_repeated_keys = sum(sample.occurrence > 0 for sample in samples)
        rows = _Rows()
        for sample in samples:
            self._add_row(rows, sample)
        self.unreadable.update(problem for problem in rows.problems if problem)
        numbers = np.array(rows.numbers, np.int64)
        starts, offsets, sizes = (
            np.array(column, np.int64)[numbers]
            for column in (self._starts, self._offsets, self._sizes)
        )
        if self._truncated is not None:
            sizes = np.minimum(sizes, self._reader.end() - offsets)
        table = rows.table(starts, offsets, sizes)
        for name, column in columns_of(rows.values, self._columns).items():
            table = table.append_column(name, column)
        return table

    def _add_row(self, rows: _Rows, sample: SampleMembers) -> None:
        whole, truncated = sample.members, None
        if self._truncated is not None:
            whole = [member for member in sample.members if member[1] != self._truncated]
            truncated = "truncated" if len(whole) < len(sample.members) else None
        hasher = self._uid.copy()
        hasher.update(f"{sample.key}\0{sample.occurrence}".encode())
        captions, caption_problem = self._finder.find(whole, self._sizes, self._kept_content)
        if captions:
            self._captions_left -= sum(map(len, captions))
            if self._captions_left < 0:
                captions, caption_problem = [], TOO_LONG
        image_extension, image, size = None, None, None
        problem: str | None = "no image"
        images = self._images
        for extension, number in whole:
            if number in images:
                image_extension, image = extension, number
                size, problem = images[number]
                break
        problem = truncated or problem or caption_problem
        rows.uids.append(hasher.digest())
        rows.keys.append(sample.key)
        rows.captions.append(captions[0] if captions else None)
        rows.all_captions.append(captions if len(captions) > 1 else None)
        rows.image_extensions.append(image_extension)
        image_at = -1
        rows.pixels.append(size)
        rows.problems.append(problem)
        for extension, number in sample.members:
            if number == image:
                image_at = len(rows.numbers)
            rows.extensions.append(extension)
            rows.numbers.append(number)
        rows.image_at.append(image_at)
        rows.ends.append(len(rows.numbers))
        if self._columns:
            rows.values.append(self._row_values(whole, image) if problem is None else {})

    def _row_values(self, members: list[tuple[str, int]], image: int | None) -> dict[str, Any]:
        values = dict(self._values.get(-1 if image is None else image, {}))
        if self._of_json:
            number = next((number for extension, number in members if extension == "json"), None)
            if number is not None:
                content = self._kept_content(number, self._sizes[number])
                values |= find_values(content, self._of_json)
        return values


class _Rows:
    """Columns under construction; the members of all samples stand one after the other."""

    def __init__(self) -> None:
        self.uids: list[bytes] = []
        self.keys: list[str] = []
        self.captions: list[str | None] = []
        self.all_captions: list[list[str] | None] = []
        self.image_extensions: list[str | None] = []
        self.image_at: list[int] = []  # which member is the picture; -1: none
        self.pixels: list[tuple[int, int] | None] = []
        self.problems: list[str | None] = []
        self.values: list[dict[str, Any]] = []
        self.extensions: list[str] = []
        self.numbers: list[int] = []
        self.ends: list[int] = []  # of each sample's members

    def table(
        self,
        starts: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> pa.Table:
        """Return the table; the arrays are those of the members, in the order of `numbers`."""
        image = np.array(self.image_at, np.int64)
        has_image = image >= 0
        image_offsets, image_sizes = np.zeros_like(image), np.zeros_like(image)
        image_offsets[has_image] = offsets[image[has_image]]
        image_sizes[has_image] = sizes[image[has_image]]
        width, height = (
            pa.array([None if p is None else p[side] for p in self.pixels], pa.int32())
            for side in (0, 1)
        )
        ends = pa.array(np.array([0, *self.ends], np.int32))

        def listed(values: Any, kind: pa.DataType) -> pa.Array:
            return pa.ListArray.from_arrays(ends, pa.array(values, kind))

        columns = [
            pa.array(self.uids, pa.binary(16)),
            pa.array(self.keys, pa.string()),
            pa.array(self.captions, pa.string()),
            pa.array(self.all_captions, pa.list_(pa.string())),
            pa.array(self.image_extensions, pa.string()),
            pa.array(image_offsets, mask=~has_image),
            pa.array(image_sizes, mask=~has_image),
            width,
            height,
            listed(self.extensions, pa.string()),
            listed(starts, pa.int64()),
            listed(offsets, pa.int64()),
            listed(sizes, pa.int64()),
            pa.array(self.problems, pa.string()),
        ]
        return pa.table(columns, schema=SCHEMA)
