"""Account for a curation job: what was read, kept and dropped, and what that did to the pool.

`make_report` returns a JSON object (docs/formats.md, "Curation report"). Its numbers come from the
indexes and decisions of all shards, one task a shard, merged in any order. An HTML page is made of
it by `pairmill report`.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs import draws
from configs.errors import DataError
from curation.arrow import read_parquet
from curation.balancing.metadata import metadata_digest
from curation.caption_sample import Sampled, first_captions, sample_captions, summarize_captions
from curation.imbalance import head_tail_histogram, imbalance
from curation.index import read_index_file
from curation.manifest import software_version
from curation.outliers import (
    OutlierRules,
    Outliers,
    merge_outliers,
    shard_outliers,
    summarize_outliers,
)
from curation.repeats import (
    KEPT,
    REFERENCE_COLUMNS,
    RepeatRules,
    Repeats,
    reference,
    shard_repeats,
    summarize,
)
from curation.rules import Rules
from curation.score_report import RuleScores, ScoreRules, shard_scores, summarize_scores
from curation.words import WordCounts, count_words, frequency_curve
from curation.work import WorkFolder, read_decisions

if TYPE_CHECKING:  # a worker needs neither, and they take long to import
    from curation.config import CurateConfig
    from curation.engine import Engine

VERSION = 1
SAMPLES_PER_REASON = 24
MAX_LISTED_SHARDS = 100
TOP = 50

# Upper edges are open at the end: a bin holds edge <= value < next edge, the last one all above.
_SIDES = (0, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "image_shorter_side": _SIDES,
    "image_longer_side": _SIDES,
    # Squares have a bin of their own: 1 to below 1.01.
    "image_aspect": (0, 0.2, 0.33, 0.5, 0.67, 0.75, 0.9, 1, 1.01, 1.11, 1.34, 1.5, 2, 3, 5),
    "caption_words": (*range(33), 40, 48, 64, 96, 128, 256),
    "caption_characters": (*range(0, 100, 5), *range(100, 200, 20), 200, 300, 400, 600, 1000, 2000),
}
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ReportTask:
    """Look at the index and the decisions of one shard."""

    shard: str
    index: Path
    index_digest: str
    decisions: Path
    inputs_digest: str
    seed: int
    num_in_pool: int
    repeats: RepeatRules
    outliers: OutlierRules
    scores: ScoreRules

    def __str__(self) -> str:
        return self.shard


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What one shard adds to the report."""

    num_samples: int
    words: tuple[Counter[str], Counter[str]]  # of readable samples, of kept ones
    histograms: dict[str, tuple[IntArray, IntArray]]
    samples: dict[str, list[tuple[int, str, dict[str, Any]]]]  # reason -> (rank, uid, reference)
    captions: list[Sampled]
    repeats: Repeats
    outliers: Outliers
    scores: dict[str, RuleScores]


def report_shard(task: ReportTask) -> ShardReport:
    """Count what the report needs of one shard."""
    index = read_index_file(task.index, list(REFERENCE_COLUMNS), digest=task.index_digest)
    columns = ["uid", "verdict", "reason", *task.repeats.columns, *task.scores.columns]
    columns += [column for column, _ in task.outliers.columns]
    columns = list(dict.fromkeys(columns))
    decisions = read_decisions(task.decisions, columns, task.inputs_digest)
    verdicts = decisions["verdict"].to_numpy(zero_copy_only=False)
    readable, kept = verdicts != "unreadable", verdicts == KEPT
    captions = np.array(index["caption"].to_pylist(), dtype=object)
    words_kept = count_words(captions[kept])
    words_readable = count_words(captions[readable & ~kept])
    words_readable.update(words_kept)
    outcomes = np.where(kept, KEPT, decisions["reason"].to_pylist())
    return ShardReport(
        num_samples=len(verdicts),
        words=(words_readable, words_kept),
        histograms=_histograms(index, captions, readable, kept),
        samples=_references(task, index, outcomes),
        captions=sample_captions(
            index["uid"].to_pylist(),
            captions,
            outcomes,
            readable,
            seed=task.seed,
            num_in_pool=task.num_in_pool,
        ),
        repeats=shard_repeats(task.shard, index, decisions, task.repeats, task.seed),
        outliers=shard_outliers(task.shard, index, decisions, task.outliers, outcomes),
        scores=shard_scores(task.shard, index, decisions, task.scores),
    )


def _histograms(
    index: pa.Table, captions: npt.NDArray[Any], readable: Any, kept: Any
) -> dict[str, tuple[IntArray, IntArray]]:
    texts = captions[readable]
    width = index["width"].to_numpy()[readable]
    height = index["height"].to_numpy()[readable]
    values = {
        "image_shorter_side": np.minimum(width, height),
        "image_longer_side": np.maximum(width, height),
        "image_aspect": width / np.maximum(height, 1),
        "caption_words": np.array([len(text.split()) for text in texts]),
        "caption_characters": np.array([len(text) for text in texts]),
    }
    counted = {}
    for name, edges in HISTOGRAMS.items():
        bins = np.searchsorted(edges, values[name], side="right") - 1
        counted[name] = (
            np.bincount(bins, minlength=len(edges)).astype(np.int64),
            np.bincount(bins[kept[readable]], minlength=len(edges)).astype(np.int64),
        )
    return counted


def _references(
    task: ReportTask, index: pa.Table, reasons: npt.NDArray[Any]
) -> dict[str, list[tuple[int, str, dict[str, Any]]]]:
    """Return for each reason the references of its first samples by hash of uid."""
    if not len(reasons):
        return {}
    uids = index["uid"].to_pylist()
    ranks = draws.bits(task.seed, "report/sample", *draws.uid_words(uids)).tolist()
    by_reason: dict[str, list[tuple[int, str, int]]] = {}
    for row, reason in enumerate(reasons):
        by_reason.setdefault(reason, []).append((ranks[row], uids[row].hex(), row))
    chosen = {}
    for reason, rows in by_reason.items():
        chosen[reason] = [
            (rank, uid, reference(task.shard, index, row))
            for rank, uid, row in heapq.nsmallest(SAMPLES_PER_REASON, rows)
        ]
    return chosen


def _tasks(
    config: CurateConfig, scanned: pa.Table, rows: Sequence[Mapping[str, Any]]
) -> list[ReportTask]:
    repeats, outliers = RepeatRules.of(config), OutlierRules.of(config)
    scores = ScoreRules.of(config)
    num_in_pool = sum(scanned["num_samples"].to_pylist())
    return [
        ReportTask(
            shard=row["path"],
            index=Path(row["index"]),
            index_digest=row["index_digest"],
            decisions=Path(row["decisions"]),
            inputs_digest=row["inputs_digest"],
            seed=config.seed,
            num_in_pool=num_in_pool,
            repeats=repeats,
            outliers=outliers,
            scores=scores,
        )
        for row in rows
    ]


def make_report(
    config: CurateConfig, scanned: pa.Table, decided: pa.Table, engine: Engine
) -> dict[str, Any]:
    """Return the report of a job as a JSON object.

    Raises:
        DataError: some sample that was read is neither kept, dropped nor unreadable.
    """
    rows = decided.to_pylist()
    tasks = _tasks(config, scanned, rows)
    repeats, outliers = Repeats(), Outliers()
    scores: dict[str, RuleScores] = {}
    words = (WordCounts(), WordCounts())
    histograms = {
        name: (np.zeros(len(edges), np.int64), np.zeros(len(edges), np.int64))
        for name, edges in HISTOGRAMS.items()
    }
    samples: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
    captions: list[Sampled] = []
    for _, part in engine.map(report_shard, tasks, label="report"):
        for total, more in zip(words, part.words, strict=True):
            total.add(more)
        for name, (before, after) in part.histograms.items():
            histograms[name][0][:] += before
            histograms[name][1][:] += after
        for reason, chosen in part.samples.items():
            both = samples.get(reason, []) + chosen
            samples[reason] = heapq.nsmallest(SAMPLES_PER_REASON, both, key=lambda s: s[:2])
        captions = first_captions([*captions, *part.captions])
        repeats.merge(part.repeats)
        outliers = merge_outliers(outliers, part.outliers)
        for label, own in part.scores.items():
            scores.setdefault(label, RuleScores()).merge(own)
    totals = _totals(config, scanned, rows)
    return {
        **totals,
        **summarize(repeats, RepeatRules.of(config), rows, totals["dropped"], engine),
        "scores": summarize_scores(scores, ScoreRules.of(config)),
        **summarize_captions(captions, KEPT),
        **summarize_outliers(outliers, OutlierRules.of(config)),
        "entries": _entries(config),
        "words": {"before": words[0].summary(TOP), "after": words[1].summary(TOP)},
        "histograms": {
            name: {
                "edges": list(HISTOGRAMS[name]),
                "before": before.tolist(),
                "after": after.tolist(),
            }
            for name, (before, after) in histograms.items()
        },
        "samples": {reason: [s[2] for s in samples[reason]] for reason in sorted(samples)},
    }


def count_verdicts(scanned: pa.Table, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the counts by verdict and reason; they add up to what was read, or DataError."""
    unreadable: Counter[str] = Counter()
    for problems in scanned["unreadable"].to_pylist():
        unreadable.update(json.loads(problems))
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(json.loads(row["reasons"]))
    dropped = Counter({r: n for r, n in reasons.items() if "/" in r})
    counts = {
        "num_read": sum(scanned["num_samples"].to_pylist()),
        "num_kept": sum(row["num_kept"] for row in rows),
        "num_dropped": dropped.total(),
        "num_unreadable": unreadable.total(),
        "dropped": dict(sorted(dropped.items())),
        "unreadable": dict(sorted(unreadable.items())),
    }
    accounted = counts["num_kept"] + counts["num_dropped"] + counts["num_unreadable"]
    if counts["num_read"] != accounted or reasons - dropped != unreadable:
        raise DataError(
            f"{counts['num_read']:,} samples were read, but {accounted:,} are kept, dropped or "
            "unreadable. The indexes changed under this job: run all its stages again."
        )
    return counts


def _totals(config: CurateConfig, scanned: pa.Table, rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = count_verdicts(scanned, rows)
    shards = scanned.to_pylist()
    broken = [s for s in shards if s["damage"] and not s["quarantined"]]
    lost = [s for s in shards if s["quarantined"]]
    ignored: Counter[str] = Counter()
    for shard in shards:
        ignored.update(json.loads(shard["ignored"]))
    return {
        "version": VERSION,
        "name": config.name,
        "seed": config.seed,
        "config_digest": config.digest(),
        "created_by": software_version(),
        **counts,
        "funnel": _funnel(config, counts),
        "sources": _sources(config, rows),
        "solutions": json.loads(WorkFolder(config.work_dir).solutions_file.read_text()),
        "shards": {
            "num_read": len(shards) - len(lost),
            "num_bytes": sum(s["num_bytes"] for s in shards),
            "ignored_members": sum(s["ignored_members"] for s in shards),
            "ignored": dict(sorted(ignored.items())),
            "repeated_keys": sum(s["repeated_keys"] for s in shards),
            "num_damaged": len(broken),
            "damaged": _listed(broken, "damage"),
            "num_quarantined": len(lost),
            "quarantined": _listed(lost, "quarantined"),
        },
    }


def _listed(shards: list[dict[str, Any]], what: str) -> list[dict[str, str]]:
    return [{"shard": s["path"], "why": s[what]} for s in shards[:MAX_LISTED_SHARDS]]


def _funnel(config: CurateConfig, counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is left after each rule, in order; the first step is reading."""
    left = counts["num_read"] - counts["num_unreadable"]
    steps = [{"rule": "read", "remaining": left, "dropped": counts["unreadable"]}]
    for label in Rules.of(config).labels:
        dropped = {
            reason.split("/", 1)[1]: n
            for reason, n in counts["dropped"].items()
            if reason.split("/", 1)[0] == label
        }
        left -= sum(dropped.values())
        steps.append({"rule": label, "remaining": left, "dropped": dropped})
    return steps


def _sources(config: CurateConfig, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each source what was read, kept, unreadable, and dropped by each rule."""
    settings = {source.name: source for source in config.sources}
    rules = Rules.of(config).labels
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        source = found.setdefault(
            row["source"],
            {
                "num_read": 0,
                "num_kept": 0,
                "num_unreadable": 0,
                "dropped": Counter(dict.fromkeys(rules, 0)),
                "weight": settings[row["source"]].weight,
                "cap": settings[row["source"]].cap,
            },
        )
        source["num_read"] += row["num_samples"]
        source["num_kept"] += row["num_kept"]
        for reason, count in json.loads(row["reasons"]).items():
            rule, _, why = reason.partition("/")
            if why:
                source["dropped"][rule] += count
            else:
                source["num_unreadable"] += count
    return {
        name: {**found[name], "dropped": dict(found[name]["dropped"])} for name in sorted(found)
    }


def _entries(config: CurateConfig) -> dict[str, Any] | None:
    """Return how the balancer changed the counts of its entries; None without a balancer."""
    if Rules.of(config).balancer is None:
        return None
    balancer = config.rules[-1].model_dump(mode="json")
    table = read_parquet(WorkFolder(config.work_dir).entry_counts)
    before, after = table["before"].to_numpy(), table["after"].to_numpy()
    top = np.lexsort((np.arange(len(before)), -before))[:TOP]
    names = table["entry"].take(top).to_pylist()
    content = {
        "balancer": balancer,
        "num_entries": len(before),
        "file": "entry_counts.parquet",
        "top": [[n, int(before[i]), int(after[i])] for n, i in zip(names, top, strict=True)],
    }
    if "metadata" in balancer:
        content["metadata_digest"] = metadata_digest(balancer["metadata"])
    matched, is_head = before > 0, table["is_head"].to_numpy(zero_copy_only=False)
    content["num_head"] = int(is_head.sum())
    content["histogram"] = head_tail_histogram(before, after)
    for when, counts in (("before", before), ("after", after)):
        content[when] = {
            "num_matched": int((counts > 0).sum()),
            "curve": frequency_curve(counts),
            **imbalance(counts[matched], is_head[matched]),
        }
    return content
