"""Write the kept samples as tars of equal size, byte for byte as they were read.

    plan     (driver)            input shards permuted by hash, cut into blocks; prefix sums
    order    (per block)         the kept samples of a block, shuffled by hash: order.py
    rename   (per key bucket)    which samples' keys came before in the output: renames.py
    copy     (per output shard)  raw spans of the source tars; index, digest: copying.py
    publish  (driver)            the manifest, last

The planner holds one row of paths and counts for each input shard and one task for each output
shard (about 1 KB each), and never a sample. Nothing depends on workers or on what ran before: the
same job gives the same bytes, and a rerun makes only what is missing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.errors import DataError, UsageError
from configs.publish import publish_text, remove_leftovers
from curation.config import CurateConfig
from curation.copying import CopyTask, Segment, copy_shard, made_before
from curation.engine import Engine
from curation.index import index_path
from curation.manifest import Manifest, Shard, read_manifest, write_manifest
from curation.order import BlockShard, Ordered, OrderTask, order_block
from curation.pieces import SourceTar
from curation.renames import RenameTask, find_renames, num_buckets
from curation.spans import is_url
from curation.unpack import UnpackTask, unpack_shard
from curation.work import WorkFolder, digest_of

VERSION = 1
# Says that a folder without a manifest is an unfinished dataset of ours.
UNFINISHED = ".pairmill-unfinished"
_SHARD_NAME = re.compile(r"(\d{5,})\.(tar|index\.parquet)")


@dataclass(frozen=True)
class Block:
    """Some input shards whose kept samples are shuffled together."""

    shards: tuple[dict[str, Any], ...]  # rows of work.DECIDED
    start: int  # position of its first sample in the output

    @property
    def num_kept(self) -> int:
        """Samples of the block in the output."""
        return sum(shard["num_kept"] for shard in self.shards)


def plan_blocks(
    decided: Sequence[dict[str, Any]], *, seed: int, shards_per_block: int
) -> list[Block]:
    """Permute the input shards by hash and cut them into blocks."""

    def rank(shard: dict[str, Any]) -> bytes:
        name = f"{seed}\0write/shards\0{shard['source']}\0{shard['shard']}"
        return hashlib.blake2b(name.encode(), digest_size=16).digest()

    shards = sorted(decided, key=rank)
    blocks, start = [], 0
    for first in range(0, len(shards), shards_per_block):
        block = Block(tuple(shards[first : first + shards_per_block]), start)
        blocks.append(block)
        start += block.num_kept
    return blocks


def cut_lengths(start: int, length: int, samples_per_shard: int) -> list[int]:
    """Cut a block's samples where output shards end; return the lengths of the pieces."""
    lengths, end = [], start + length
    while start < end:
        following = min(end, (start // samples_per_shard + 1) * samples_per_shard)
        lengths.append(following - start)
        start = following
    return lengths


def plan_segments(
    blocks: Sequence[Block], samples_per_shard: int
) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Yield (output shard, [(block, piece of the block, position of its first sample)])."""
    current: list[tuple[int, int, int]] = []
    number = 0
    for which, block in enumerate(blocks):
        at = block.start
        for piece, length in enumerate(cut_lengths(at, block.num_kept, samples_per_shard)):
            if at // samples_per_shard != number:
                yield number, current
                number, current = at // samples_per_shard, []
            current.append((which, piece, at))
            at += length
    if current:
        yield number, current


def write(config: CurateConfig, decided: pa.Table, engine: Engine) -> Manifest:
    """Write the dataset folder of the decided samples; return its manifest."""
    output, work = config.output_dir, WorkFolder(config.work_dir)
    rows = decided.to_pylist()
    num_kept = sum(row["num_kept"] for row in rows)
    if num_kept == 0:
        num_samples = sum(row["num_samples"] for row in rows)
        raise DataError(
            f"none of the {num_samples:,} samples read is kept, so there is nothing to write. "
            f"The decisions in {work.folder / 'decisions'} say why for each; loosen the rules."
        )
    plan = _plan_digest(config, rows)
    parents = _parents(rows)
    check_output(config, plan)
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "manifest.json").exists():
        _mark_unfinished(output)
    remove_leftovers(output)
    publish_text(output / "config.yaml", config.recipe())
    _remove_other_plans(work, plan)

    per_shard = config.write.samples_per_shard
    size = config.write.block_size(len(rows))
    blocks = plan_blocks(rows, seed=config.seed, shards_per_block=size)
    folder = work.plan(plan)
    ordered = _order(blocks, folder, config, engine, num_kept)
    renames = _find_renames(ordered, folder, engine, num_kept)

    num_shards = -(-num_kept // per_shard)
    width = max(5, len(str(num_shards - 1)))
    _remove_stale(output, {f"{n:0{width}d}" for n in range(num_shards)})
    tars = _source_tars(config, blocks)
    pieces = list(plan_segments(blocks, per_shard))

    def copy_tasks() -> list[CopyTask]:
        return [
            CopyTask(
                path=output / f"{number:0{width}d}.tar",
                segments=tuple(
                    Segment(ordered[b].block, piece, at, tuple(tars[b]))
                    for b, piece, at in segments
                ),
                renames=renames,
                source=config.name,
                plan=plan,
            )
            for number, segments in pieces
        ]

    tasks = copy_tasks()
    if any(row["is_gzip"] for row in rows) and not all(map(made_before, tasks)):
        _unpack(blocks, tars, folder, engine)
        tasks = copy_tasks()
    shards: list[Shard | None] = [None] * len(tasks)
    for position, copied in engine.map(copy_shard, tasks, label="write"):
        path = tasks[position].path
        shards[position] = Shard(path, copied.num_samples, copied.num_bytes, copied.digest)
    manifest = _publish(config, [shard for shard in shards if shard], parents, plan)
    shutil.rmtree(folder / "unpacked", ignore_errors=True)
    return manifest


def _source_tars(config: CurateConfig, blocks: Sequence[Block]) -> list[list[SourceTar]]:
    storage = {s.name: tuple(sorted(s.storage_options.items())) for s in config.sources}
    return [
        [
            SourceTar(
                shard["path"],
                shard["num_bytes"],
                shard["fingerprint"],
                storage[shard["source"]] if is_url(shard["path"]) else (),
            )
            for shard in block.shards
        ]
        for block in blocks
    ]


def _unpack(
    blocks: Sequence[Block], tars: list[list[SourceTar]], folder: Path, engine: Engine
) -> None:
    """Unpack the gzips among the tars; put what was unpacked in their place."""
    where = [
        (number, at)
        for number, block in enumerate(blocks)
        for at, shard in enumerate(block.shards)
        if shard["is_gzip"]
    ]
    tasks = [
        UnpackTask(
            path=folder / "unpacked" / f"{number:06d}-{at:06d}.tar",
            tar=tars[number][at],
            shard=_block_shard(blocks[number].shards[at]),
        )
        for number, at in where
    ]
    for position, unpacked in engine.map(unpack_shard, tasks, label="unpack"):
        number, at = where[position]
        tars[number][at] = unpacked.tar


def _block_shard(row: dict[str, Any]) -> BlockShard:
    return BlockShard(
        index=row["index"],
        index_digest=row["index_digest"],
        decisions=row["decisions"],
        inputs_digest=row["inputs_digest"],
    )


def _plan_digest(config: CurateConfig, rows: list[dict[str, Any]]) -> str:
    shards = [(row["source"], row["shard"], row["inputs_digest"]) for row in rows]
    layout = config.write.model_dump(mode="json")
    return digest_of(VERSION, config.name, config.seed, layout, sorted(shards))


def _parents(rows: list[dict[str, Any]]) -> list[str]:
    """Return one digest a source, over the indexes of its shards."""
    sources: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        sources.setdefault(row["source"], []).append((row["shard"], row["index_digest"]))
    return [digest_of(name, sorted(shards)) for name, shards in sorted(sources.items())]


def check_output(config: CurateConfig, plan: str | None = None) -> None:
    """Refuse an output folder that holds something else than this job's dataset.

    Raises:
        UsageError: a finished dataset of another recipe or other inputs, or foreign files.
    """
    output = config.output_dir
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"output {output} is a file; give a folder that is new or empty.")
    if (output / "manifest.json").exists():
        manifest = read_manifest(output, check_files=False)
        is_other = manifest.config_digest != config.digest()
        if is_other or (plan is not None and manifest.plan != plan):
            what = "with another configuration" if is_other else "from other inputs or metadata"
            raise UsageError(
                f"output {output} holds a finished dataset that was made {what}. "
                "Remove that folder, or give another one: output=FOLDER."
            )
    elif not (output / UNFINISHED).exists() and any(
        not name.startswith(".") for name in os.listdir(output)
    ):
        raise UsageError(
            f"output {output} is not empty, and neither manifest.json nor {UNFINISHED} says that "
            "it is a dataset of pairmill. Give a new folder: output=FOLDER."
        )


def _mark_unfinished(output: Path) -> None:
    publish_text(output / UNFINISHED, "Goes when manifest.json stands: see docs/formats.md.\n")


def _remove_other_plans(work: WorkFolder, plan: str) -> None:
    for folder in work.folder.glob("plan-*"):
        if folder != work.plan(plan):
            shutil.rmtree(folder)


def _remove_stale(output: Path, stems: set[str]) -> None:
    """Remove the shards that an unfinished run with more of them left behind."""
    if not (output / UNFINISHED).exists():
        return  # a finished dataset has the shards of its plan; others in it are not ours
    for entry in output.iterdir():
        found = _SHARD_NAME.fullmatch(entry.name)
        if found and found[1] not in stems:
            entry.unlink()


def _order(
    blocks: Sequence[Block], folder: Path, config: CurateConfig, engine: Engine, num_kept: int
) -> list[Ordered]:
    tasks = [
        OrderTask(
            path=folder / f"block-{number:06d}.arrow",
            keys=folder / f"keys-{number:06d}.bin",
            shards=tuple(map(_block_shard, block.shards)),
            start=block.start,
            lengths=tuple(cut_lengths(block.start, block.num_kept, config.write.samples_per_shard)),
            num_buckets=num_buckets(num_kept),
            seed=config.seed,
        )
        for number, block in enumerate(blocks)
    ]
    found: dict[int, Ordered] = dict(engine.map(order_block, tasks, label="order", unit="blocks"))
    return [found[number] for number in range(len(tasks))]


def _find_renames(
    ordered: Sequence[Ordered], folder: Path, engine: Engine, num_kept: int
) -> tuple[Path, ...]:
    tasks = [
        RenameTask(
            path=folder / f"renames-{bucket:06d}.npy",
            parts=tuple(
                (o.keys, o.bucket_starts[bucket], o.bucket_starts[bucket + 1]) for o in ordered
            ),
        )
        for bucket in range(num_buckets(num_kept))
    ]
    found = engine.map(find_renames, tasks, label="keys", unit="buckets")
    return tuple(tasks[position].path for position in sorted(p for p, r in found if r.num_renamed))


def _publish(config: CurateConfig, shards: list[Shard], parents: list[str], plan: str) -> Manifest:
    output = config.output_dir
    assert all(index_path(shard.path).is_file() for shard in shards)
    manifest = None
    if (output / "manifest.json").exists():
        manifest = read_manifest(output, check_files=False)
    if manifest is None or list(manifest.shards) != shards:
        _mark_unfinished(output)
        manifest = write_manifest(
            output,
            shards,
            name=config.name,
            config_digest=config.digest(),
            parents=parents,
            plan=plan,
        )
    (output / UNFINISHED).unlink(missing_ok=True)
    remove_leftovers(output)  # of workers that outlived a killed driver
    return manifest
