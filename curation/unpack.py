"""Unpack what is kept of a gzip, so that it can be copied at random.

A gzip is read once, forward; only the spans of kept samples are written, each where it lay in the
tar, and the rest is a hole that takes no space. The files go when the dataset is finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import DataError
from configs.publish import published_file
from curation.order import BlockShard, kept_rows
from curation.pieces import SourceTar
from curation.shards import BLOCK
from curation.spans import LocalReader, open_tar


@dataclass(frozen=True, kw_only=True)
class UnpackTask:
    """Unpack the kept samples of `tar` to `path`."""

    path: Path
    tar: SourceTar
    shard: BlockShard

    def __str__(self) -> str:
        return self.tar.path


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A tar to copy from instead of the packed one."""

    tar: SourceTar
    num_samples: int


def unpack_shard(task: UnpackTask) -> Unpacked:
    """Unpack the kept samples of one tar, unless an earlier run has."""
    rows = kept_rows(task.shard, 0)
    if not task.path.is_file():
        starts, offsets, sizes = (
            rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            for name in ("member_start", "member_offset", "member_size")
        )
        ends = offsets + (sizes + BLOCK - 1) // BLOCK * BLOCK
        with (
            open_tar(task.tar.path, dict(task.tar.storage)) as reader,
            published_file(task.path) as file,
        ):
            if reader.fingerprint() != task.tar.fingerprint:
                raise DataError(
                    f"{task.tar.path} is not the tar that was scanned: it changed since. Restore "
                    "it, or run the same line again with all stages."
                )
            for at in np.argsort(starts).tolist():
                start, size = int(starts[at]), int(ends[at] - starts[at])
                file.seek(start)
                file.write(reader.fetch(start, size))
            file.truncate(int(ends.max(initial=0)))
    with LocalReader(task.path) as reader:
        tar = SourceTar(str(task.path), reader.num_bytes, reader.fingerprint())
    return Unpacked(tar=tar, num_samples=rows.num_rows)
