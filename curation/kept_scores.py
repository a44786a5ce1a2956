"""Scores and vectors took a model to make: a scan anew must not throw them away unasked.

They belong to an index, and that is of one source name, its captions and its limit of pixels. A
job that reads the same tars otherwise would make another index in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import UsageError
from curation.index import IndexInfo, read_index_info
from curation.scan import InputShard, Scanned, ScanTask, scan_shard
from curation.spans import open_tar
from curation.vectors import vectors_of


def refuse_another_index(
    info: IndexInfo, shard: InputShard, captions: Sequence[str], max_image_pixels: int
) -> None:
    """Raise UsageError where the index of a tar has scores and a scan would make another one."""
    if info.plan is not None:  # of a curated shard, which is kept whatever its source is called
        return
    scores = sorted({*info.made_by, *vectors_of(shard.index)})
    pairs = {
        "source": (shard.source, info.source),
        "shard": (shard.shard, info.shard),
        "captions": (list(captions), info.captions),
        "max_image_pixels": (max_image_pixels, info.max_image_pixels),
    }
    differs = [f"{key} {got!r}, scored as {of!r}" for key, (got, of) in pairs.items() if got != of]
    if scores and differs:
        raise UsageError(
            f"{shard.index} holds the scores {', '.join(scores)}, and this job reads its tar "
            f"otherwise: {'; '.join(differs)}. Scanning it anew would throw them away. Give the "
            "job what it was scored with, or an `index_dir` of its own (and score it there)."
        )


def scan_keeping_scores(task: ScanTask) -> Scanned:
    """Scan one shard as `scan_shard` does, unless that would lose scores of the tar as it is.

    Raises:
        UsageError: it would.  DataError: as scan_shard.
    """
    known = read_index_info(task.input.index)
    if known is not None and known.fingerprint:
        try:
            refuse_another_index(known, task.input, task.captions, task.max_image_pixels)
        except UsageError:
            with open_tar(task.input.path, dict(task.input.storage)) as reader:
                if reader.fingerprint() == known.fingerprint:
                    raise
    return scan_shard(task)
