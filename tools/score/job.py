"""A scoring job: what is to be scored, by what, and what came of it, in words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from curation.engine import Engine, Resources
from curation.index import index_path, read_index_info
from curation.manifest import read_manifest
from curation.scan import InputShard, ScanTask
from curation.scoring import Output, ScoringReport, maker_of
from curation.scoring import score as score_shards
from curation.sources import find_shards, num_bytes_of
from tools.score import ocr
from tools.score.base import Score
from tools.score.config import ModelConfig, ScoreConfig
from tools.score.scorer import ScorerSpec, build_scorer

_SHARES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
_MAX_LOOKED_AT = 1000


class ScorePlan:
    """The scores of a job that can run here, what they make, and why others are skipped."""

    def __init__(self, config: ScoreConfig) -> None:
        self.sections: list[Any] = []
        self.scores: list[Score] = []
        self.skipped: dict[str, str] = {}
        absent = ocr.why_absent()
        for section in config.scores:
            built: Score = section.build()
            if (built.uses_ocr or built.uses_masked) and absent is not None:
                self.skipped[", ".join(sorted(built.names))] = absent
                continue
            self.sections.append(section)
            self.scores.append(built)
        self.model = config.model if any(s.uses_model for s in self.scores) else None
        self.outputs = self._outputs()

    def _outputs(self) -> tuple[Output, ...]:
        judge = {} if self.model is None else _model_digests(self.model)
        self.weights_digest = judge.get("weights")
        outputs = []
        for section, score in zip(self.sections, self.scores, strict=True):
            # Not what its outputs are called, nor where a file lies: its content counts.
            passed_over = {*score.columns, *score.vectors, "vectors"}
            tree = section.model_dump(mode="json", exclude=passed_over)
            recipe: dict[str, Any] = {"score": tree, "version": score.version}
            recipe["files"] = score.digest()
            if score.uses_model:
                recipe["model"] = judge
            if score.uses_ocr or score.uses_masked:
                recipe["ocr"] = ocr.description()
            by = f" by {self.model.checkpoint}" if score.uses_model and self.model else ""
            for is_vectors, named in ((False, score.columns), (True, score.vectors)):
                for role, name in named.items():
                    text = json.dumps({**recipe, "role": role}, sort_keys=True)
                    digest = hashlib.sha256(text.encode()).hexdigest()
                    outputs.append(Output(name, digest, f"{section.name}{by}", is_vectors))
        return tuple(outputs)


def _model_digests(model: ModelConfig) -> dict[str, str]:
    from evaluation.identity import identify

    known = identify(model.checkpoint, model.weights)
    return {
        "weights": known.digest,
        "setting": known.setting_digest,
        "precision": model.precision,
    }


def find_inputs(config: ScoreConfig) -> list[ScanTask]:
    """Return the shards of a job, in canonical order.

    Raises:
        UsageError: a pattern matches nothing, or a tar belongs to two sources.
        DataError: the manifest is not one.
    """
    how: dict[str, Any] = {"captions": config.captions}
    how["max_image_pixels"] = config.max_image_pixels
    if config.manifest is not None:
        manifest = read_manifest(config.manifest)
        paths = [Path(os.path.abspath(shard.path)) for shard in manifest.shards]
        shards = [
            InputShard(
                source=manifest.name, shard=path.name, path=str(path), index=index_path(path)
            )
            for path in paths
        ]
        return [ScanTask(input=shard, **how) for shard in shards]
    beside = Path(os.path.abspath(config.index_dir)) if config.index_dir else None
    shards, owner = [], dict[str, str]()
    for source in sorted(config.sources, key=lambda source: source.name):
        options = source.storage_options
        found = find_shards(source.name, source.patterns, index_dir=beside, storage=options)
        for shard in found:
            if owner.setdefault(shard.path, source.name) != source.name:
                raise UsageError(
                    f"{shard.path} belongs to two sources, {owner[shard.path]!r} and "
                    f"{source.name!r}. A shard can have one only: narrow a pattern."
                )
        shards += found
    return [ScanTask(input=shard, **how) for shard in shards]


def run(config: ScoreConfig) -> str:
    """Score what is missing; return in words what all shards hold now."""
    plan, shards = ScorePlan(config), find_inputs(config)
    if not plan.scores:
        return _skipped(plan)
    with Engine(config.engine) as engine:
        report = score_shards(
            shards,
            plan.outputs,
            build_scorer,
            _spec(config, plan),
            engine=engine,
            resources=_resources(config),
            replace=config.replace,
        )
    return describe(report, plan)


def _spec(config: ScoreConfig, plan: ScorePlan) -> ScorerSpec:
    model = plan.model
    sections = []
    for section in plan.sections:
        tree = section.model_dump(mode="json")
        for key in tree:  # a worker may have another current folder
            if isinstance(getattr(section, key), Path):
                tree[key] = os.path.abspath(tree[key])
        sections.append(json.dumps(tree))
    spec = ScorerSpec(
        sections=tuple(sections),
        batch_size=config.batch_size,
        num_threads=config.resources.num_cpus,
    )
    if model is None:
        return spec
    is_here = os.path.exists(model.checkpoint)
    return replace(
        spec,
        checkpoint=os.path.abspath(model.checkpoint) if is_here else model.checkpoint,
        digest=plan.weights_digest,
        weights=model.weights,
        device=model.device,
        precision=model.precision,
    )


def _resources(config: ScoreConfig) -> Resources:
    own = config.resources
    return Resources(num_actors=config.actors, num_cpus=own.num_cpus, num_gpus=own.num_gpus)


def _skipped(plan: ScorePlan) -> str:
    return "\n".join(f"skipped: {names}: {why}" for names, why in plan.skipped.items())


def describe(report: ScoringReport, plan: ScorePlan) -> str:
    """Return a table of what the shards hold: of each column how its values lie."""
    lines = [
        f"{report.num_samples:,} samples in {report.num_shards:,} shards, of which "
        f"{report.num_done_before:,} were scored before; {report.num_unreadable:,} samples are "
        f"unreadable by their index, {report.num_bad:,} images of the shards scored now cannot be "
        "used: these have no score"
    ]
    lines += [f"  cannot be used: {name}" for name in report.bad[:10]]
    if len(report.bad) > 10:
        lines.append(f"  and {report.num_bad - 10:,} more")
    lines += [f"shard not read: {why}" for why in report.quarantined]
    width = max(len(output.name) for output in report.outputs)
    if report.columns:
        head = "".join(f"{share:>11.0%}" for share in _SHARES)
        lines.append(f"{'below which lie':<{width}} {'scores':>12} {'none':>10}{head}")
    for name in sorted(report.columns):
        counts = report.columns[name]
        found = [counts.quantile(share) for share in _SHARES]
        cells = "".join(f"{'-':>11}" if value is None else f"{value:>11.4g}" for value in found)
        total = counts.counts.total()
        lines.append(f"{name:<{width}} {total:>12,} {counts.num_null:>10,}{cells}")
    vectors = [output.name for output in report.outputs if output.is_vectors]
    lines += [f"vectors {name}: beside the index of each shard" for name in vectors]
    if plan.skipped:
        lines.append(_skipped(plan))
    return "\n".join(lines)


def dry_run(config: ScoreConfig) -> str:
    """Check what can be checked before the work; say what it would do, in words.

    Raises:
        PairmillError: the model, the shards or a file of a score is not what it should be.
    """
    plan, shards = ScorePlan(config), find_inputs(config)
    num_bytes = sum(num_bytes_of(shard.input) for shard in shards)
    lines = [f"{len(shards):,} shards, {num_bytes / 1e6:,.1f} MB"]
    lines += [
        f"{'vectors' if output.is_vectors else 'column'} {output.name}: {output.what}"
        for output in plan.outputs
    ]
    lines += _missing(shards[:_MAX_LOOKED_AT], plan.outputs)
    own = config.resources
    many = (
        "as many actors as there is room for"
        if config.actors is None
        else f"{config.actors} actor(s)"
    )
    lines.append(
        f"{many}, of {own.num_cpus} CPU(s) and {own.num_gpus:g} GPU(s) each; batches of "
        f"{config.batch_size}"
    )
    if plan.skipped:
        lines.append(_skipped(plan))
    return "\n".join(lines)


def _missing(shards: Sequence[ScanTask], outputs: Sequence[Output]) -> list[str]:
    num_indexes, lacking, foreign = 0, 0, set[str]()
    for shard in shards:
        info = read_index_info(shard.input.index)
        if info is None:
            continue
        num_indexes += 1
        makers = {o.name: maker_of(shard.input.index, info, o) for o in outputs}
        lacking += any(makers[o.name] != o.made_by for o in outputs)
        foreign |= {o.name for o in outputs if makers[o.name] not in (None, o.made_by)}
    lines = [
        f"of the first {len(shards):,} shards {num_indexes:,} have an index (the others are "
        f"scanned first), and {lacking:,} of those lack scores"
    ]
    if foreign:
        lines.append(
            f"{', '.join(sorted(foreign))}: there, but made by another model or setting; they are "
            "replaced only with replace=true"
        )
    return lines
