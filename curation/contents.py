"""What a scan keeps of the contents of members until their samples are whole (rows.py).

Small texts and JSONs, the size of every image, and what the columns of a job need of images. All is
known by the number of the member in its tar.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.columns import find_values, read_values
from curation.image_header import quick_jpeg_sizes, quick_size, read_image_size
from curation.shards import Batch, Words, digests_of
from curation.spans import SpanReader

Ints = npt.NDArray[np.int64]
Size = tuple[tuple[int, int] | None, str | None]  # (width, height) in pixels, problem

# Texts and JSONs are kept until their sample is whole; larger ones are read again.
_MAX_KEPT_BYTES = 64 << 10
_MAX_KEPT_SHARD_BYTES = 64 << 20
_PREFIX_BYTES = 4096
_NO_INTS = np.zeros(0, np.int64)
_NO_BYTES = np.zeros(0, np.uint8)
_NO_WORDS = np.zeros((0, 2), np.uint64)


class Texts:
    """Small members, one behind the other."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[np.uint8]] = []
        self._numbers: list[Ints] = []
        self._sizes: list[Ints] = []
        self._by_number: dict[int, bytes] | None = None

    def add(self, numbers: Ints, sizes: Ints, content: npt.NDArray[np.uint8]) -> None:
        """Add the contents of some members, which are `content` together."""
        self._numbers.append(numbers)
        self._sizes.append(sizes)
        self._parts.append(content)

    @property
    def numbers(self) -> Ints:
        """The numbers of the members."""
        return np.concatenate([_NO_INTS, *self._numbers])

    def array(self) -> pa.Array:
        """Return the texts as they are, whether or not they are UTF-8."""
        ends = np.cumsum(np.concatenate([_NO_INTS, [0], *self._sizes]), dtype=np.int32)
        buffers = [
            None,
            pa.py_buffer(ends),
            pa.py_buffer(np.concatenate([_NO_BYTES, *self._parts])),
        ]
        return pa.Array.from_buffers(pa.binary(), len(ends) - 1, buffers)

    def get(self, number: int) -> bytes | None:
        """Return the content of a member; None: it was not kept."""
        if self._by_number is None:
            numbers = self.numbers.tolist()
            self._by_number = dict(zip(numbers, self.array().to_pylist(), strict=True))
        return self._by_number.get(number)


class Contents:
    """Takes members batch by batch. `max_pixels` and `of_image`: see RowBuilder."""

    def __init__(self, reader: SpanReader, max_pixels: int, of_image: Iterable[str]) -> None:
        self.captions, self.others = Texts(), Texts()
        self.values: dict[int, dict[str, Any]] = {}
        self.odd_images: dict[int, Size] = {}  # for which there is more to say than a size
        self._image_numbers: list[Ints] = []
        self._image_sizes: list[Ints] = []
        self._reader = reader
        self._max_pixels = max_pixels
        self._of_image = tuple(of_image)
        self._hashed: list[tuple[Ints, Words]] = []  # numbers, and what was hashed on the way
        self._bytes_left = _MAX_KEPT_SHARD_BYTES

    def keep(self, into: Texts, batch: Batch, rows: Ints, first: int) -> None:
        """Keep those of the members `rows` that are small; `first` is the number of row 0."""
        rows = rows[batch.sizes[rows] <= _MAX_KEPT_BYTES]
        rows = rows[: np.searchsorted(np.cumsum(batch.sizes[rows]), self._bytes_left, "right")]
        if not len(rows):
            return
        from curation import kernels

        begins, sizes = batch.positions[rows], batch.sizes[rows]
        num_bytes = int(sizes.sum())
        self._bytes_left -= num_bytes
        is_here = begins + sizes <= batch.limits[rows]
        content = np.empty(num_bytes, np.uint8)
        kernels.copy_spans(batch.data, begins, np.where(is_here, sizes, -sizes), content)
        for at in np.flatnonzero(~is_here).tolist():
            size, begin = int(sizes[at]), int(sizes[:at].sum())
            part = self._reader.read(int(batch.offsets[rows[at]]), size)
            content[begin : begin + size] = np.frombuffer(part, np.uint8)
        into.add(rows + first, sizes, content)

    def content(self, number: int, offset: int, num_bytes: int) -> bytes:
        """Return a member's bytes, kept or read."""
        for kept in (self.captions, self.others):
            found = kept.get(number)
            if found is not None:
                return found
        return self._reader.read(offset, num_bytes)

    def add_images(self, batch: Batch, rows: Ints, first: int) -> None:
        """Find the sizes of the images `rows`, and their values."""
        if not len(rows):
            return
        begins, sizes = batch.positions[rows], batch.sizes[rows]
        limits = np.minimum(begins + np.minimum(sizes, _PREFIX_BYTES), batch.limits[rows])
        found = quick_jpeg_sizes(batch.data, begins, limits)
        is_odd = (found[:, 0] == 0) | (found[:, 0] * found[:, 1] > self._max_pixels)
        # A JPEG with much before its picture (EXIF, a colour profile) needs a longer look.
        is_cut = is_odd & (limits - begins < np.minimum(sizes, _PREFIX_BYTES))
        batch.is_too_short = 8 * int(np.count_nonzero(is_cut)) > len(rows)
        for at in np.flatnonzero(is_odd).tolist():
            size, problem = self._image_size(batch, int(rows[at]), int(limits[at]))
            found[at] = size or (0, 0)
            if problem is not None:
                self.odd_images[int(rows[at]) + first] = size, problem
        self._image_numbers.append(rows + first)
        self._image_sizes.append(found)
        if self._of_image:
            self._add_values(batch, rows, first)

    def _add_values(self, batch: Batch, rows: Ints, first: int) -> None:
        if len(batch.hashed_rows):
            self._hashed.append((batch.hashed_rows + first, batch.hashes))
            rows = rows[~np.isin(rows, batch.hashed_rows, assume_unique=True)]
        begins = batch.positions[rows]
        ends = begins + batch.sizes[rows]
        is_here = (ends <= batch.limits[rows]).tolist()
        spans = zip(rows.tolist(), begins.tolist(), ends.tolist(), is_here, strict=True)
        odd, values, names = self.odd_images, self.values, self._of_image
        with batch.data.data as data:
            for row, begin, end, here in spans:
                number = row + first
                if number in odd:
                    continue
                if here:
                    with data[begin:end] as view:
                        values[number] = find_values(view, names)
                else:
                    offset = int(batch.offsets[row])
                    values[number] = read_values(self._reader, offset, end - begin, names)

    def _image_size(self, batch: Batch, row: int, limit: int) -> Size:
        position, size = int(batch.positions[row]), int(batch.sizes[row])
        found = quick_size(batch.data[position:limit].tobytes()) if limit > position else None
        if found is None:
            return read_image_size(lambda n: self._prefix(batch, row, n), size, self._max_pixels)
        return found, "too many pixels" if found[0] * found[1] > self._max_pixels else None

    def _prefix(self, batch: Batch, row: int, num_bytes: int) -> bytes:
        """Return the first bytes of a member."""
        num_bytes = min(num_bytes, int(batch.sizes[row]))
        position = int(batch.positions[row])
        if position + num_bytes <= batch.limits[row]:
            return batch.data[position : position + num_bytes].tobytes()
        return self._reader.read(int(batch.offsets[row]), num_bytes)

    def settle(self) -> None:
        """Put all that is known of images into `values`."""
        for numbers, hashes in self._hashed:
            listed = zip(numbers.tolist(), digests_of(hashes).tolist(), strict=True)
            self.values.update((number, {"image_hash": digest}) for number, digest in listed)
        self._hashed = []

    def image_hashes(self, numbers: Ints) -> list[bytes | None]:
        """Return the hashes of images, where that is all that is wanted of them; -1: no image."""
        known = np.concatenate([_NO_INTS, *(n for n, _ in self._hashed)])
        digests = digests_of(np.concatenate([_NO_WORDS, *(h for _, h in self._hashed)]))
        at = np.minimum(np.searchsorted(known, numbers), max(len(known) - 1, 0))
        is_known = known[at] == numbers if len(known) else np.zeros(len(numbers), np.bool_)
        found: list[bytes | None] = [None] * len(numbers)
        if len(known):
            found = digests[at].tolist()
        for row in np.flatnonzero(~is_known).tolist():
            found[row] = self.values.get(int(numbers[row]), {}).get("image_hash")
        return found

    def image_sizes(self) -> tuple[Ints, Ints]:
        """Return the numbers of the images, and their (width, height); (0, 0): it has none."""
        none = np.zeros((0, 2), np.int64)
        return (
            np.concatenate([_NO_INTS, *self._image_numbers]),
            np.concatenate([none, *self._image_sizes]),
        )

    def images(self) -> dict[int, Size]:
        """Return the size and the problem of every image."""
        numbers, sizes = self.image_sizes()
        found: dict[int, Size] = {
            number: ((width, height), None)
            for number, (width, height) in zip(numbers.tolist(), sizes.tolist(), strict=True)
        }
        return found | self.odd_images
