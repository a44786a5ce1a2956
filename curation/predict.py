"""Predict what a job would keep, from the indexes that are there: nothing of the job is written.

The rules run as in the job, into a folder that is removed at the end. A pool of more than
MAX_SAMPLES is predicted from some of its shards, chosen by hash; thresholds, sizes and caps are
then scaled by their share. Global rules see those shards only, so duplicates across shards are
underestimated: the text says from how many shards it comes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import did_you_mean
from curation.arrow import read_parquet
from curation.config import CurateConfig
from curation.decide import decide
from curation.engine import Engine
from curation.filters.base import needs_of
from curation.global_rules.base import warnings_of
from curation.imbalance import head_tail_histogram, imbalance
from curation.index import digest_of_index, read_index_file, read_index_info
from curation.kept_scores import refuse_another_index
from curation.rules import Rules
from curation.scan import InputShard
from curation.sources import num_bytes_of
from curation.vectors import read_vectors_info
from curation.work import SCANNED, WorkFolder

MAX_SAMPLES = 2_000_000
_MAX_LOOKED_AT = 20_000
# Rule -> its key that counts samples.
_COUNTED = {"clipcov": "size", "semantic_balance": "max_per_cluster"}
_HOW = "`pairmill curate CONFIG 'stages=[scan]'` makes them and writes nothing else of the dataset."
_SCORES = " `pairmill score` adds the scores: {}."


@dataclass(frozen=True, kw_only=True)
class _BytesTask:
    index: Path
    index_digest: str
    decisions: Path

    def __str__(self) -> str:
        return str(self.index)


@dataclass(frozen=True)
class _Bytes:
    num_samples: int
    num_bytes: int


def _kept_bytes(task: _BytesTask) -> _Bytes:
    """Return the bytes that the kept samples of a shard take in a tar."""
    names = ["member_start", "member_offset", "member_size"]
    index = read_index_file(task.index, names, digest=task.index_digest)
    decisions = read_parquet(task.decisions, ["verdict"])
    kept = index.filter(pc.equal(decisions["verdict"], "kept")).combine_chunks()
    start, offset, size = (
        kept[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in names
    )
    spans = offset - start + -(-size // 512) * 512
    return _Bytes(kept.num_rows, int(spans.sum()))


def predict(config: CurateConfig, shards: Sequence[InputShard]) -> list[str]:
    """Return lines that say what the job would keep, or how to get an index first."""
    rules = Rules.of(config)
    needs, vectors = needs_of(rule.build() for rule in rules.rules), rules.vectors
    columns = (*needs.columns, *needs.scored)
    chosen, num_looked_at = _choose(config, shards, columns, vectors)
    if not chosen:
        what = f" with the columns {', '.join(columns)}" if columns else ""
        if vectors:
            what += f" and the vectors {', '.join(vectors)}, which `pairmill score` makes,"
        which = (
            "none of the shards" if num_looked_at == len(shards) else f"none of {num_looked_at:,}"
        )
        how = f"{_HOW}{_SCORES.format(', '.join(needs.scored)) if needs.scored else ''}"
        info = read_index_info(shards[0].index)
        for name in needs.scored if info else ():
            near = did_you_mean(name, info.columns if info else ())
            how += f" {name!r}{near}" if near != "." else ""
        return [f"no prediction: {which} has an index{what} yet. {how}"]
    is_part = len(chosen) < len(shards)
    share = sum(row["num_bytes"] for row in chosen) / sum(num_bytes_of(s) for s in shards)
    lines = []
    if is_part:
        lines.append(
            f"the prediction comes from {len(chosen):,} of {len(shards):,} shards ({share:.1%} of "
            f"the bytes) and is scaled up"
        )
    if len(chosen) < num_looked_at:
        lines.append(f"{num_looked_at - len(chosen):,} shards have no index yet. {_HOW}")
    with tempfile.TemporaryDirectory(prefix="pairmill-dry-run-") as folder:
        changes: dict[str, Any] = {"output": str(Path(folder, "dataset"))}
        if is_part:
            changes |= _scaled(config, share)
        trial = config.model_copy(update=changes)
        with Engine(config.engine) as engine:
            decided = decide(trial, pa.Table.from_pylist(chosen, schema=SCANNED), "", engine)
            tasks = [
                _BytesTask(
                    index=Path(row["index"]),
                    index_digest=row["index_digest"],
                    decisions=Path(row["decisions"]),
                )
                for row in decided.to_pylist()
            ]
            found = engine.map(_kept_bytes, tasks, label="bytes")
            num_bytes = sum(part.num_bytes for _, part in found)
        return lines + _text(trial, decided, num_bytes, 1 / share if is_part else 1.0)


def _choose(
    config: CurateConfig,
    shards: Sequence[InputShard],
    columns: tuple[str, ...],
    vectors: tuple[str, ...],
) -> tuple[list[dict[str, Any]], int]:
    """Return rows of SCANNED for the shards to predict from, and how many were looked at.

    All that have an index, in their order; of a large pool as many as make MAX_SAMPLES, by hash.
    """

    def rank(number: int) -> bytes:
        name = f"{config.seed}\0predict\0{shards[number].source}\0{shards[number].shard}"
        return hashlib.blake2b(name.encode(), digest_size=16).digest()

    chosen: dict[int, dict[str, Any]] = {}
    num_samples = num_looked_at = 0
    for number in sorted(range(len(shards)), key=rank):
        if num_samples >= MAX_SAMPLES or num_looked_at >= _MAX_LOOKED_AT:
            break
        num_looked_at += 1
        row = _row(config, shards[number], columns, vectors)
        if row is not None:
            chosen[number] = row
            num_samples += row["num_samples"]
    return [chosen[number] for number in sorted(chosen)], num_looked_at


def _row(
    config: CurateConfig, shard: InputShard, columns: tuple[str, ...], vectors: tuple[str, ...]
) -> dict[str, Any] | None:
    """Return the row of a shard with an index of its present state, all the columns and vectors."""
    info = read_index_info(shard.index)
    if info is None or info.num_bytes != num_bytes_of(shard):
        return None
    refuse_another_index(info, shard, config.captions, config.max_image_pixels)
    if not set(columns) <= set(info.columns):
        return None
    if any(read_vectors_info(shard.index, name) is None for name in vectors):
        return None
    return {
        "source": shard.source,
        "shard": shard.shard,
        "path": str(shard.path),
        "index": str(shard.index.absolute()),
        "index_digest": digest_of_index(info, columns),
        "num_samples": info.num_samples,
        "num_bytes": info.num_bytes,
        "is_gzip": info.is_gzip,
        "ignored_members": info.ignored_members,
        "unreadable": json.dumps(info.unreadable),
    }


def _scaled(config: CurateConfig, share: float) -> dict[str, Any]:
    """Return the rules and sources with what counts samples scaled by the share."""

    def scale(rule: Any) -> Any:
        changes: dict[str, Any] = {}
        for key, least in (("t", 1e-9), ("target_size", 1)):
            value = getattr(rule, key, None)
            # A WFPP `t` is a frequency, which does not change with the size of the pool.
            if value is not None and hasattr(rule, "target_size"):
                changes[key] = max(least, type(value)(value * share))
        counted = getattr(rule, _COUNTED.get(rule.name, ""), None)
        if counted is not None:
            changes[_COUNTED[rule.name]] = max(1, round(counted * share))
        return rule.model_copy(update=changes)

    sources = [
        s if s.cap is None else s.model_copy(update={"cap": round(s.cap * share)})
        for s in config.sources
    ]
    return {"rules": tuple(map(scale, config.rules)), "sources": tuple(sources)}


def _text(config: CurateConfig, decided: pa.Table, num_bytes: int, scale: float) -> list[str]:
    rows = decided.to_pylist()
    num_read, num_kept = (
        round(scale * sum(row[name] for row in rows)) for name in ("num_samples", "num_kept")
    )
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(json.loads(row["reasons"]))
    per_shard = config.write.samples_per_shard
    about = "about " if scale != 1 else ""
    lines = [
        f"prediction: {about}{num_kept:,} of {num_read:,} samples kept "
        f"({num_kept / max(num_read, 1):.1%}), {scale * num_bytes / 1e6:,.1f} MB in "
        f"{-(-num_kept // per_shard):,} shards"
    ]
    lines += [f"  {round(scale * n):>13,}  {why}" for why, n in sorted(reasons.items())]
    work = WorkFolder(config.work_dir)
    solutions = json.loads(work.solutions_file.read_text())
    for label, values in solutions.items():
        if "target_size" in values:
            lines.append(f"{label}: t = {values['t'] * scale:,.6g} for the target size")
    lines += [f"warning: {said}" for said in warnings_of(solutions)]
    if Rules.of(config).balancer:
        lines += _histogram(read_parquet(work.entry_counts), scale)
    return lines


def _histogram(table: pa.Table, scale: float) -> list[str]:
    before, after = table["before"].to_numpy(), table["after"].to_numpy()
    is_head = table["is_head"].to_numpy(zero_copy_only=False)
    matched = before > 0
    shares = [imbalance(counts[matched], is_head[matched]) for counts in (before, after)]
    lines = [
        f"entries: {int(matched.sum()):,} matched, {int(is_head.sum()):,} of them above t (head), "
        f"with {shares[0]['head_share']:.1%} of the matches before, {shares[1]['head_share']:.1%} "
        f"after; Gini {shares[0]['gini']:.3f} -> {shares[1]['gini']:.3f}",
        "  samples with the entry   entries   -> after        matches   -> after",
    ]
    for row in head_tail_histogram(
        np.round(before * scale).astype(np.int64), np.round(after * scale).astype(np.int64)
    ):
        lines.append(
            f"  from {row['from']:>14,} {row['entries_before']:>14,} {row['entries_after']:>10,} "
            f"{row['matches_before']:>14,} {row['matches_after']:>10,}"
        )
    return lines
