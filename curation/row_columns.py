"""The columns of an index under construction, one entry a sample or a member."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.index import SCHEMA

Ints = npt.NDArray[np.int64]


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


class Rows:
    """Columns under construction; the members of all samples stand one after the other."""

    def __init__(self) -> None:
        self.uids: list[bytes] = []
        self.keys: Any = []
        self.captions: list[str | None] | pa.Array = []
        self.all_captions: list[list[str] | None] = []
        self.image_extensions: list[str | None] | pa.Array = []
        self.image_at: Any = []  # which member is the picture; -1: none
        self.pixels: Any = []  # width, height; (0, 0): none
        self.problems: list[str | None] = []
        self.values: list[dict[str, Any]] = []
        self.image_hashes: list[bytes | None] | None = None  # in place of `values`
        self.extensions: list[str] | pa.Array = []
        self.numbers: Any = []
        self.ends: Any = []  # of each sample's members

    def table(self, starts: Ints, offsets: Ints, sizes: Ints) -> pa.Table:
        """Return the table; the arrays are those of the members, in the order of `numbers`."""
        image = np.array(self.image_at, np.int64)
        has_image = image >= 0
        image_offsets, image_sizes = np.zeros_like(image), np.zeros_like(image)
        image_offsets[has_image] = offsets[image[has_image]]
        image_sizes[has_image] = sizes[image[has_image]]
        listed_pixels = self.pixels
        if not isinstance(listed_pixels, np.ndarray):
            listed_pixels = np.array([size or (0, 0) for size in listed_pixels], np.int64)
        pixels = listed_pixels.astype(np.int32).reshape(-1, 2)
        width, height = (pa.array(pixels[:, n], mask=pixels[:, 0] == 0) for n in (0, 1))
        ends = pa.array(np.concatenate(([0], self.ends)).astype(np.int32))

        def listed(values: Any, kind: pa.DataType) -> pa.Array:
            return pa.ListArray.from_arrays(ends, _array(values, kind))

        columns = [
            pa.array(self.uids, pa.binary(16)),
            pa.array(self.keys, pa.string()),
            _array(self.captions, pa.string()),
            pa.array(self.all_captions, pa.list_(pa.string())),
            _array(self.image_extensions, pa.string()),
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
