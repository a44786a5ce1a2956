"""A curation job: scan -> decide -> write -> report, each of which can also run alone.

    report = curate(load_config("demo/curate", CurateConfig))
    print(report.text())

Every stage leaves files that are whole or absent, and a rerun makes what is missing: the same line
continues a job that was stopped at any moment.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.errors import DataError, UsageError
from configs.publish import publish_text
from curation.arrow import read_parquet
from curation.config import CurateConfig, find_inputs
from curation.decide import decide
from curation.engine import Engine
from curation.filters.base import Needs, needs_of
from curation.global_rules.base import warnings_of
from curation.index import IndexInfo, remove_index_leftovers
from curation.kept_scores import scan_keeping_scores
from curation.manifest import Manifest, manifest_of_tars, read_manifest
from curation.predict import predict
from curation.report import count_verdicts, make_report
from curation.rules import Rules
from curation.scan import InputShard, ScanTask
from curation.sources import find_shards, fixed_folder, num_bytes_of
from curation.spans import is_url
from curation.work import DECIDED, SCANNED, WorkFolder, digest_of, publish_table
from curation.write import check_output, write


@dataclass(frozen=True)
class CurationReport:
    """What a job has done: its counts, and report.json where that stage has run."""

    output: Path
    counts: dict[str, Any]
    manifest: Manifest | None = None
    content: dict[str, Any] | None = None
    warnings: Sequence[str] = ()  # of the global rules

    def text(self) -> str:
        """Return the counts as a short table."""
        read = self.counts["num_read"]
        rows = [("read", read)]
        if "num_kept" in self.counts:
            rows.append(("kept", self.counts["num_kept"]))
            rows += [(f"dropped: {why}", n) for why, n in self.counts["dropped"].items()]
        rows += [(f"unreadable: {why}", n) for why, n in self.counts["unreadable"].items()]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {n:>13,}  {n / max(read, 1):>7.1%}" for name, n in rows]
        lines += [f"shard not read: {why}" for why in self.counts["quarantined"]]
        lines += [f"warning: {said}" for said in self.warnings]
        if self.manifest:
            lines.append(
                f"{self.output}: {self.manifest.num_samples:,} samples in "
                f"{self.manifest.num_shards:,} shards, {self.manifest.num_bytes / 1e6:,.1f} MB"
            )
        return "\n".join(lines)


def curate(config: CurateConfig) -> CurationReport:
    """Run the stages of a job; return what they counted.

    Raises:
        UsageError: an input or an earlier stage is missing, the output holds something else.
        DataError: no shard can be read, no sample is kept, or files changed meanwhile.
    """
    _check(config)
    shards = find_inputs(config) if "scan" in config.stages else []
    work = WorkFolder(config.work_dir)
    work.remove_leftovers()
    rules = Rules.of(config)  # a factory refuses a file that its keywords name and is not there
    needs = needs_of(rule.build() for rule in rules.rules)
    scan_inputs = _scan_inputs(config, needs)
    decide_inputs = digest_of(scan_inputs, rules.digest, config.seed)
    decided = manifest = content = None
    with Engine(config.engine) as engine:
        if "scan" in config.stages:
            scanned = scan(config, shards, needs, engine, scan_inputs)
        else:
            scanned = work.read_summary("scanned", stage="scan", inputs=scan_inputs)
        if "decide" in config.stages:
            decided = decide(config, scanned, decide_inputs, engine)
        elif {"write", "report"} & set(config.stages):
            decided = work.read_summary("decided", stage="decide", inputs=decide_inputs)
        if "write" in config.stages:
            assert decided is not None
            manifest = write(config, decided, engine)
        if "report" in config.stages:
            assert decided is not None
            content = report(config, scanned, decided, engine)
    solutions = {} if decided is None else json.loads(work.solutions_file.read_text())
    return CurationReport(
        Path(config.output),
        _counts(scanned, decided),
        manifest,
        content,
        warnings_of(solutions),
    )


def scan(
    config: CurateConfig,
    shards: Sequence[InputShard],
    needs: Needs,
    engine: Engine,
    inputs: str,
) -> pa.Table:
    """Make the missing indexes with the columns that rules need; one row a shard (SCANNED)."""
    remove_index_leftovers({shard.index.parent for shard in shards})
    limit = config.max_image_pixels
    tasks = [
        ScanTask(
            input=shard,
            max_image_pixels=limit,
            captions=config.captions,
            columns=needs.columns,
            scored=needs.scored,
        )
        for shard in shards
    ]
    makers = OneMaker(needs.scored)
    rows: list[dict[str, Any]] = [{} for _ in tasks]
    for position, scanned in engine.map(scan_keeping_scores, tasks, label="scan"):
        shard, info = shards[position], scanned.info
        makers.see(shard, info)
        rows[position] = {
            "source": shard.source,
            "shard": shard.shard,
            "path": shard.path,
            "index": str(shard.index.absolute()),
            "index_digest": scanned.index_digest,
            "num_samples": info.num_samples,
            "num_bytes": info.num_bytes,
            "fingerprint": info.fingerprint,
            "is_gzip": info.is_gzip,
            "ignored_members": info.ignored_members,
            "ignored": json.dumps(info.ignored),
            "repeated_keys": info.repeated_keys,
            "unreadable": json.dumps(info.unreadable),
            "damage": info.damage,
            "quarantined": scanned.quarantined,
        }
    lost = [row for row in rows if row["quarantined"]]
    if len(lost) == len(rows):
        raise DataError(
            f"none of the {len(rows)} shards can be read; the first is {lost[0]['path']}: "
            f"{lost[0]['quarantined']}. Expected WebDataset tars: look at the sources of the job."
        )
    table = pa.Table.from_pylist(rows, schema=SCANNED)
    return WorkFolder(config.work_dir).publish_summary("scanned", table, inputs)


def report(
    config: CurateConfig, scanned: pa.Table, decided: pa.Table, engine: Engine
) -> dict[str, Any]:
    """Publish report.json, and the counts of all entries beside it; return the report."""
    output, work = config.output_dir, WorkFolder(config.work_dir)
    if not (output / "manifest.json").exists():
        raise UsageError(
            f"stage 'write' has not run yet: {output} has no manifest.json. Run it first: "
            "`stages=[write]`, or leave `stages` out."
        )
    content = make_report(config, scanned, decided, engine)
    if content["entries"]:
        table = read_parquet(work.entry_counts)
        publish_table(output / "entry_counts.parquet", table)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    publish_text(output / "report.json", text + "\n")
    return content


class OneMaker:
    """Watches that a score is one and the same in all shards: that of two models cannot be
    compared with one threshold.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        self._seen: dict[str, tuple[str, InputShard]] = {}

    def see(self, shard: InputShard, info: IndexInfo) -> None:
        """Take in the index of a shard. Raises DataError where another differs."""
        for name in self._columns if info.columns else ():
            maker, first = self._seen.setdefault(name, (info.made_by.get(name, ""), shard))
            if info.made_by.get(name, "") != maker:
                raise DataError(
                    f"the score {name!r} was made by two models or settings: that of {first} "
                    f"differs from that of {shard}, and one threshold cannot judge both. Run "
                    "`pairmill score` on all shards with one configuration (replace=true where "
                    "it finds another's scores)."
                )


def _scan_inputs(config: CurateConfig, needs: Needs) -> str:
    sources = [[source.name, source.patterns] for source in config.sources]
    tables = [SCANNED.names, DECIDED.names]  # an older pairmill's are made anew
    how = (config.max_image_pixels, config.captions, needs, tables)
    return digest_of(sorted(sources), config.index_dir, *how)


def _counts(scanned: pa.Table, decided: pa.Table | None) -> dict[str, Any]:
    lost = [f"{s['path']}: {s['quarantined']}" for s in scanned.to_pylist() if s["quarantined"]]
    if decided is not None:
        return {**count_verdicts(scanned, decided.to_pylist()), "quarantined": lost}
    unreadable: dict[str, int] = {}
    for problems in scanned["unreadable"].to_pylist():
        for problem, count in json.loads(problems).items():
            unreadable[problem] = unreadable.get(problem, 0) + count
    num_read = sum(scanned["num_samples"].to_pylist())
    return {"num_read": num_read, "unreadable": unreadable, "quarantined": lost}


def _check(config: CurateConfig) -> None:
    """Raise what can be known to be wrong before any work is done."""
    check_output(config)
    output = config.output_dir
    for source in config.sources:
        for pattern in source.patterns:
            if is_url(pattern):
                continue
            folder = Path(fixed_folder(pattern))
            if Path(pattern).is_dir() and output.is_relative_to(folder):
                raise UsageError(
                    f"output {output} lies inside {folder}, which source {source.name!r} reads: "
                    "the next run would read what this one wrote. Give a folder outside of it."
                )
    _probe(config)


def _probe(config: CurateConfig) -> None:
    """Raise UsageError where the output folder, or the work folder beside it, cannot be made."""
    for folder in (config.output_dir, config.work_dir):
        where = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".pairmill-probe-", dir=where))
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be made or written: {where} takes no new folder "
                f"({error.strerror}). Give another output: output=FOLDER."
            ) from None


def dry_run(config: CurateConfig) -> str:
    """Check all that can be checked before the work; return what it would do, in words.

    Where there are indexes, it also says what would be kept (predict.py).

    Raises:
        PairmillError: what is wrong with the paths, the metadata or the output folder.
    """
    _check(config)
    lines = []
    shards = find_inputs(config)
    rules = Rules.of(config)
    for source in sorted({shard.source for shard in shards}):
        sizes = [num_bytes_of(s) for s in shards if s.source == source]
        lines.append(f"source {source}: {len(sizes):,} shards, {sum(sizes) / 1e6:,.1f} MB")
    if rules.balancer:
        lines.append(f"{rules.balancer.label}: {rules.balancer.build().describe()}")
    per_block, per_shard = config.write.block_size(len(shards)), config.write.samples_per_shard
    lines += [
        f"rules, in order: {', '.join(rules.labels) or 'none'}",
        f"{len(shards):,} shards make {-(-len(shards) // per_block):,} block(s) of up to "
        f"{per_block:,}; samples are shuffled within a block and written {per_shard:,} to a shard",
        f"dataset: {config.output}; decisions and partial results: {config.work_dir}",
        *predict(config, shards),
    ]
    return "\n".join(lines)


def index(patterns: Sequence[str]) -> str:
    """Make indexes and a manifest for tars that others wrote, in place; return what was done.

    `patterns` are folders, tars, globs or brace patterns; the manifest goes into the folder that
    they have in common.
    """
    if any(map(is_url, patterns)):
        raise UsageError(
            f"{next(filter(is_url, patterns))} is a URL: an index lies beside its tars, and none "
            "is written to remote storage. Copy the tars, or curate them (`pairmill curate`)."
        )
    shards = find_shards("index", sorted(patterns))
    folder = Path(shards[0].path).parents[len(Path(shards[0].shard).parts) - 1]
    with Engine() as engine:
        manifest = manifest_of_tars(
            folder,
            [Path(shard.path) for shard in shards],
            map_shards=lambda function, tasks: engine.map(function, tasks, label="index"),
        )
    read_manifest(folder)
    return (
        f"{folder}: {manifest.num_samples:,} samples in {manifest.num_shards:,} shards, "
        f"{manifest.num_bytes / 1e6:,.1f} MB"
    )
