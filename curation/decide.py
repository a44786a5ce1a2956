"""Decide for every sample whether it is kept: two passes over the shards with one barrier.

    match   (per shard)  filters in order; the balancer's entries of what they left; their counts
    merge   (driver)     the pool's counts: a sum, in any order of shards
    decide  (per shard)  keep probability, draw, verdict -> the decision table (docs/formats.md)

A filter sees only what no rule before it dropped; its values are null for the others. Results
lie on disk and are used again while all that they depend on is the same: with another `t` nothing
is matched again. A worker holds one shard.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import draws
from configs.errors import DataError
from curation.balancing import Balancer, balancers
from curation.config import CurateConfig
from curation.engine import Engine
from curation.filters import filters
from curation.index import read_index_file
from curation.work import DECIDED, WorkFolder, digest_of, publish_table, read_metadata

VERSION = 1
NO_ENTRY = "no entry matched"
BALANCED = "balanced away"


@dataclass(frozen=True)
class Rules:
    """The rules of a job in a form that travels to workers: JSON, built again there."""

    labels: tuple[str, ...]
    sections: tuple[str, ...]  # each rule's configuration: what digests are made of
    placed: tuple[str, ...]  # the same with absolute paths, for workers with another current folder

    @classmethod
    def of(cls, config: CurateConfig) -> Rules:
        """Return the rules of a configuration."""
        trees = [rule.model_dump(mode="json") for rule in config.rules]
        placed = [
            {key: os.path.abspath(v) if isinstance(getattr(rule, key), Path) else v
             for key, v in tree.items()}
            for rule, tree in zip(config.rules, trees, strict=True)
        ]  # fmt: skip
        return cls(
            tuple(config.rule_labels()),
            tuple(map(json.dumps, trees)),
            tuple(map(json.dumps, placed)),
        )

    def build(self) -> list[tuple[str, Any]]:
        """Return (label, filter or balancer) in order."""
        return list(zip(self.labels, map(_build, self.placed), strict=True))

    @property
    def balancer(self) -> tuple[str, Balancer] | None:
        """The balancer and its label; it can only be the last rule."""
        if self.sections and json.loads(self.sections[-1])["name"] in balancers:
            return self.labels[-1], _build(self.placed[-1])
        return None

    @property
    def match_digest(self) -> str:
        """Digest of what the first pass depends on."""
        balancer = self.balancer
        local = self.sections[:-1] if balancer else self.sections
        return digest_of(VERSION, self.labels, local, balancer and balancer[1].match_digest)


def _build(section: str) -> Any:
    tree = json.loads(section)
    registry: Any = balancers if tree["name"] in balancers else filters
    return registry.section(tree["name"]).model_validate(tree).build()


@dataclass(frozen=True, kw_only=True)
class MatchTask:
    """Judge one shard by all filters and match what is left."""

    shard: str
    index: Path
    index_digest: str
    partial: Path
    rules: Rules
    match_digest: str

    def __str__(self) -> str:
        return self.shard

    @property
    def inputs_digest(self) -> str:
        """Digest of all that the partial result depends on."""
        return digest_of(self.index_digest, self.match_digest)


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A shard's share of the pool's counts: ids of entries, and how many samples have each."""

    num_samples: int
    entries: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def match_shard(task: MatchTask) -> Matched:
    """Run the first pass over one shard, or read what an earlier run left of it."""
    balancer = task.rules.balancer
    column = f"{balancer[0]}.entries" if balancer else None
    if read_metadata(task.partial).get("inputs") == task.inputs_digest:
        table = pq.read_table(task.partial, columns=[column or "uid"], partitioning=None)
    else:
        table = judge_samples(read_index_file(task.index), task.rules.build())
        publish_table(task.partial, table, {"inputs": task.inputs_digest})
    if balancer is None:
        nothing = np.zeros(0, np.int64)
        return Matched(num_samples=table.num_rows, entries=nothing, counts=nothing)
    entries, counts = _sparse_counts(table[column])
    return Matched(num_samples=table.num_rows, entries=entries, counts=counts)


def _sparse_counts(matched: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    ids = matched.combine_chunks().drop_null().flatten().to_numpy(zero_copy_only=False)
    entries, counts = np.unique(ids, return_counts=True)
    return entries.astype(np.int64), counts.astype(np.int64)


def judge_samples(samples: pa.Table, rules: Sequence[tuple[str, Any]]) -> pa.Table:
    """Return the columns uid, key, verdict, reason, RULE.VALUE..., and RULE.entries of a balancer.

    `reason` is that of the first failing filter, or the problem of an unreadable sample; `kept`
    means that no filter dropped it, and the balancer has the last word.
    """
    samples = samples.combine_chunks()
    reasons = samples["problem"].to_numpy(zero_copy_only=False).astype(object)
    columns: dict[str, Any] = {"uid": samples["uid"], "key": samples["key"]}
    values: dict[str, Any] = {}
    for label, rule in rules:
        alive = np.array([reason is None for reason in reasons], dtype=bool)
        left = samples.filter(pa.array(alive)).combine_chunks()
        rows = pa.array(np.cumsum(alive) - 1, mask=~alive)  # null where a sample is out already
        if hasattr(rule, "match"):
            values[f"{label}.entries"] = rule.match(left).take(rows)
            continue
        judgement = rule(left)
        for name, value in judgement.values.items():
            values[f"{label}.{name}"] = value.take(rows)
        failed = judgement.reasons.to_pylist()
        reasons[alive] = [reason and f"{label}/{reason}" for reason in failed]
    is_readable = samples["problem"].is_null().to_numpy()
    verdicts = np.where([reason is None for reason in reasons], "kept", "dropped").astype(object)
    verdicts[~is_readable] = "unreadable"
    columns["verdict"] = pa.array(verdicts, pa.string())
    return pa.table({**columns, "reason": pa.array(reasons, pa.string()), **values})


@dataclass(frozen=True, kw_only=True)
class DecideTask:
    """Draw, and write the decision table of one shard."""

    shard: str
    partial: Path
    decisions: Path
    counts: Path
    counts_digest: str
    rules: Rules
    seed: int
    inputs_digest: str

    def __str__(self) -> str:
        return self.shard


@dataclass(frozen=True, kw_only=True)
class Decided:
    """A shard's counts by verdict and reason, and of the entries of its kept samples."""

    num_samples: int
    num_kept: int
    reasons: dict[str, int]
    entries: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def decide_shard(task: DecideTask) -> Decided:
    """Run the second pass over one shard, or read what an earlier run decided."""
    balancer = task.rules.balancer
    if read_metadata(task.decisions).get("inputs") == task.inputs_digest:
        table = pq.read_table(task.decisions, partitioning=None).combine_chunks()
    else:
        partial = pq.read_table(task.partial, partitioning=None).combine_chunks()
        counts = _read_counts(task.counts, task.counts_digest) if balancer else None
        table = draw_samples(partial, balancer, counts, task.seed)
        publish_table(task.decisions, table, {"inputs": task.inputs_digest})
    kept = pc.equal(table["verdict"], "kept")
    reasons = Counter(table["reason"].drop_null().to_pylist())
    entries = counts_kept = np.zeros(0, np.int64)
    if balancer:
        entries, counts_kept = _sparse_counts(table[f"{balancer[0]}.entries"].filter(kept))
    return Decided(
        num_samples=table.num_rows,
        num_kept=int(pc.sum(kept).as_py() or 0),
        reasons=dict(sorted(reasons.items())),
        entries=entries,
        counts=counts_kept,
    )


@lru_cache(maxsize=1)
def _read_counts(path: Path, digest: str) -> npt.NDArray[np.int64]:
    counts: npt.NDArray[np.int64] = np.load(path, allow_pickle=False)
    return counts


def draw_samples(
    partial: pa.Table,
    balancer: tuple[str, Balancer] | None,
    counts: npt.NDArray[np.int64] | None,
    seed: int,
) -> pa.Table:
    """Return the decision table of a shard from its first pass and the pool's counts."""
    num_samples = partial.num_rows
    reasons = partial["reason"].to_numpy(zero_copy_only=False).astype(object)
    probability = np.full(num_samples, np.nan)
    draw = np.full(num_samples, np.nan)
    verdicts = partial["verdict"].to_numpy(zero_copy_only=False).astype(object)
    is_drawn = (verdicts == "kept") & (balancer is not None)
    if balancer is not None and is_drawn.any():
        label, rule = balancer
        assert counts is not None
        mask = pa.array(is_drawn)
        matched = partial[f"{label}.entries"].filter(mask).combine_chunks()
        words = draws.uid_words(partial["uid"].filter(mask).to_pylist())
        chosen = rule.keep_probability(matched, counts)
        drawn = draws.uniform(seed, f"{label}/draw", *words)
        probability[is_drawn], draw[is_drawn] = chosen, drawn
        has_entry = matched.value_lengths().to_numpy(zero_copy_only=False) > 0
        why = np.where(has_entry, f"{label}/{BALANCED}", f"{label}/{NO_ENTRY}").astype(object)
        why[drawn < chosen] = None
        reasons[is_drawn] = why
        verdicts[is_drawn] = np.where(drawn < chosen, "kept", "dropped")
    table = partial.drop_columns(["verdict", "reason"])
    table = table.add_column(2, "verdict", pa.array(verdicts, pa.string()))
    table = table.add_column(3, "reason", pa.array(reasons, pa.string()))
    table = table.append_column("keep_probability", pa.array(probability, mask=~is_drawn))
    return table.append_column("draw", pa.array(draw, mask=~is_drawn))


def decide(config: CurateConfig, scanned: pa.Table, inputs: str, engine: Engine) -> pa.Table:
    """Decide for all samples of the scanned shards; return one row a shard (work.DECIDED)."""
    work = WorkFolder(config.work_dir)
    rules = Rules.of(config)
    match_digest = rules.match_digest
    shards = [row for row in scanned.to_pylist() if row["quarantined"] is None]
    matching = [_match_task(row, work, rules, match_digest) for row in shards]
    balancer = rules.balancer
    counts = np.zeros(len(balancer[1].entries) if balancer else 0, np.int64)
    for _, matched in engine.map(match_shard, matching, label="match"):
        counts[matched.entries] += matched.counts
    counts_digest = work.publish_counts(counts)
    deciding = [
        DecideTask(
            shard=task.shard,
            partial=task.partial,
            decisions=work.decisions(row["source"], row["shard"]),
            counts=work.counts,
            counts_digest=counts_digest,
            rules=rules,
            seed=config.seed,
            inputs_digest=digest_of(task.inputs_digest, rules.sections, config.seed, counts_digest),
        )
        for task, row in zip(matching, shards, strict=True)
    ]
    after = np.zeros_like(counts)
    rows: list[dict[str, Any]] = [{} for _ in deciding]
    for position, decided in engine.map(decide_shard, deciding, label="decide"):
        after[decided.entries] += decided.counts
        rows[position] = _summary(shards[position], deciding[position], decided)
    if balancer:
        _publish_entry_counts(work, balancer[1].entries, counts, after)
    return work.publish_summary("decided", DECIDED, rows, inputs)


def _match_task(row: dict[str, Any], work: WorkFolder, rules: Rules, digest: str) -> MatchTask:
    return MatchTask(
        shard=row["path"],
        index=Path(row["index"]),
        index_digest=row["index_digest"],
        partial=work.partial(row["source"], row["shard"]),
        rules=rules,
        match_digest=digest,
    )


def _summary(shard: dict[str, Any], task: DecideTask, decided: Decided) -> dict[str, Any]:
    if decided.num_samples != shard["num_samples"]:
        raise DataError(
            f"{shard['index']}: {decided.num_samples} rows, {shard['num_samples']} when scanned. "
            "It changed since: run the scan again (`stages=[scan]`)."
        )
    return {
        **{name: shard[name] for name in DECIDED.names if name in shard},
        "decisions": str(task.decisions),
        "inputs_digest": task.inputs_digest,
        "num_kept": decided.num_kept,
        "reasons": json.dumps(decided.reasons),
    }


def _publish_entry_counts(
    work: WorkFolder,
    entries: list[str],
    before: npt.NDArray[np.int64],
    after: npt.NDArray[np.int64],
) -> None:
    columns = {"entry": pa.array(entries, pa.string()), "before": before, "after": after}
    publish_table(work.entry_counts, pa.table(columns))
