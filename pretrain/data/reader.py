"""Samples by (shard, row): byte ranges from the index, read by `pread`.

No memory maps: on shared storage a truncated file must be an error, not a bus fault. Sizes are
checked when a shard is opened. Of each index only the columns that training needs are kept, and
only of the shards that the current windows touch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import DataError
from curation.manifest import Manifest, read_index

_COLUMNS = ["key", "caption", "image_offset", "image_size", "problem"]


class RawSample(NamedTuple):
    """A sample as it stands in its shard; `key` names it in messages as `shard:key`."""

    key: str
    caption: str
    image: bytes


class UnusableSampleError(Exception):
    """A sample that cannot be trained on: which, and why.

    It is replaced and counted, never fatal.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


@dataclass
class _OpenShard:
    path: Path
    descriptor: int
    columns: dict[str, list[Any]]


class ShardReader:
    """Reads samples of a manifest's shards; keeps at most `max_open_shards` of them open."""

    def __init__(self, manifest: Manifest, *, max_open_shards: int) -> None:
        self._manifest = manifest
        self._max_open_shards = max_open_shards
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def read(self, shard: int, row: int) -> RawSample:
        """Return the sample in `row` of shard number `shard`.

        Raises:
            UnusableSampleError: the index says that this sample cannot be read.
            DataError: the shard is missing, cut, or not what the manifest says.
        """
        opened = self._shard(shard)
        columns = opened.columns
        name = f"{opened.path.name}:{columns['key'][row]}"
        if columns["problem"][row] is not None:
            raise UnusableSampleError(name, columns["problem"][row])
        size = columns["image_size"][row]
        image = os.pread(opened.descriptor, size, columns["image_offset"][row])
        if len(image) != size:
            raise DataError(
                f"{opened.path}: got {len(image)} of the {size} bytes of sample "
                f"{columns['key'][row]!r}; the file was cut after it was opened."
            )
        return RawSample(name, columns["caption"][row], image)

    def _shard(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._max_open_shards:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest.descriptor)
        self._open[shard] = opened = self._open_shard(shard)
        return opened

    def _open_shard(self, shard: int) -> _OpenShard:
        path, expected = self._manifest.path(shard), self._manifest.shards[shard]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened ({error.strerror}); the manifest names it. "
                "Restore it, or run `pairmill curate` again: it writes what is missing."
            ) from None
        size = os.fstat(descriptor).st_size
        if size != expected.num_bytes:
            os.close(descriptor)
            raise DataError(
                f"{path}: has {size:,} bytes, the manifest says {expected.num_bytes:,}; it was "
                "cut or "
                "changed since. Restore it, or delete it and run `pairmill curate` again."
            )
        table = read_index(path, columns=_COLUMNS)
        if table.num_rows != expected.num_samples:
            raise DataError(
                f"{path}: its index has {table.num_rows} samples, the manifest says "
                f"{expected.num_samples}. Delete the index and run `pairmill index` on the folder."
            )
        return _OpenShard(path, descriptor, table.to_pydict())

    def close(self) -> None:
        """Close every open shard."""
        for opened in self._open.values():
            os.close(opened.descriptor)
        self._open.clear()
