"""Run an evaluation: each checkpoint encodes each dataset once; methods run on the features.

    evaluate(config, ["runs/demo"]) -> rows, also in OUTPUT/results.jsonl; pictures in
    OUTPUT/examples.json, curves and matrices in OUTPUT/details.json

What is computed does not depend on the number of ranks or workers, on what else is evaluated beside
it, or on how often the run was stopped. (Another batch size rounds the last bits of a feature
otherwise; it is part of the features' key.)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import PairmillError, UsageError
from configs.load import digest, to_yaml
from configs.publish import publish_text
from evaluation.average import average_row, why_no_average
from evaluation.cache import FeatureCache
from evaluation.config import DatasetConfig, EvaluateConfig, PixelBaselineConfig
from evaluation.dataset import EvaluationDataset, Part
from evaluation.datasets import Absent, load_datasets
from evaluation.details import details_of, publish_details
from evaluation.examples import (
    candidate_texts,
    publish_examples,
    read_examples,
    retrieval_examples,
)
from evaluation.features import EncodeOptions, Features
from evaluation.identity import choose_device, find_model, identify
from evaluation.interpolated import interpolations
from evaluation.jobs import Job, done_jobs, jobs_of, methods_by_dataset
from evaluation.methods.registry import Outcome
from evaluation.methods.retrieval import recalls
from evaluation.methods.zero_shot import accuracies
from evaluation.pixel_baseline import (
    CaptionScores,
    find_neighbours,
    reference_digest,
    reference_tars,
)
from evaluation.predictions import publish_predictions
from evaluation.result import (
    BASELINE,
    Result,
    locked,
    publish_results,
    read_published,
    software_version,
)
from evaluation.statistics import AnyMetric, intervals
from evaluation.subject import Subject
from evaluation.world import World, joined

Datasets = list[tuple[DatasetConfig, EvaluationDataset]]


def evaluate(
    config: EvaluateConfig, checkpoints: Sequence[str], part: tuple[int, int] = (0, 1)
) -> list[Result]:
    """Evaluate every checkpoint on every dataset; publish and return the rows, sorted.

    What a method gave is published before the next one starts, the baseline comes last; what stands
    in the output with the same digests is not computed again. `part` (place, number) takes every
    number-th pair of checkpoint and dataset. Raises UsageError, DataError or CheckpointError before
    anything is encoded where a dataset or a checkpoint is not what it should be.
    """
    _check(config, checkpoints)
    datasets, absent = load_datasets(config)
    methods_by_dataset(config, datasets)
    for one in absent:
        print(f"absent: {one.config.label}: {one.reason}", file=sys.stderr)
    with joined() as world:
        checkpoints = _with_interpolations(config, checkpoints, world)
        for number, checkpoint in enumerate(checkpoints):
            first = number * len(datasets)
            mine = [d for i, d in enumerate(datasets, first) if i % part[1] == part[0]]
            if mine:
                _evaluate_checkpoint(config, checkpoint, mine, datasets, world)
        error = None
        if world.rank == 0:
            try:
                _finish(config, checkpoints, datasets, absent, part)
            except (PairmillError, OSError) as caught:
                error = caught
        world.together(error)
    wanted = {section.label for section, _ in datasets}
    named = {*checkpoints, BASELINE}
    rows = [row for row in read_published(config.output_folder) if row.checkpoint in named]
    return [row for row in rows if row.dataset in wanted or row.method == "average"]


def _with_interpolations(
    config: EvaluateConfig, checkpoints: Sequence[str], world: World
) -> Sequence[str]:
    """Return the checkpoints and the models on the way to them, which rank 0 writes."""
    if config.wise_ft is None:
        return checkpoints
    zero, alphas = config.wise_ft.zero, config.wise_ft.alphas
    error = None
    if world.rank == 0:
        try:
            interpolations(zero, checkpoints, alphas, config.cache, config.weights)
        except (PairmillError, OSError) as caught:
            error = caught
    world.together(error)
    return [*checkpoints, *interpolations(zero, checkpoints, alphas, config.cache, config.weights)]


def _evaluate_checkpoint(
    config: EvaluateConfig, checkpoint: str, mine: Datasets, datasets: Datasets, world: World
) -> None:
    identity = identify(checkpoint, config.weights)
    options = EncodeOptions(config.batch_size, config.num_workers, config.max_undecodable)
    features = Features(
        identity,
        FeatureCache(config.cache),
        options,
        device=config.device,
        precision=config.precision,
        weights=config.weights,
        world=world,
    )
    others = {section.label: dataset for section, dataset in datasets}
    queue: list[tuple[EvaluationDataset, list[Job]]] = []
    done = done_jobs(read_published(config.output_folder), checkpoint)
    for section, dataset in mine:
        sections = config.method_sections(section, dataset.task)
        jobs, left_out = jobs_of(config, identity, dataset, sections, others)
        for reason in left_out if world.rank == 0 else ():
            print(f"left out: {reason}", file=sys.stderr)
        todo = [job for job in jobs if (dataset.name, job.digest) not in done]
        if todo:
            queue.append((dataset, todo))
    world.together()  # all ranks have read the same results before one of them adds to them
    if world.size > 1:
        _prefetch(features, queue, others)
    error = None
    if world.rank == 0:
        features.world = World()  # what is left is done by this rank alone
        try:
            for dataset, todo in queue:
                _run_jobs(config, features, dataset, todo, others)
        except (PairmillError, OSError) as caught:
            error = caught
    world.together(error)


def _prefetch(
    features: Features,
    queue: Sequence[tuple[EvaluationDataset, list[Job]]],
    others: dict[str, EvaluationDataset],
) -> None:
    """Encode all images that the queue needs, every rank its share."""
    for dataset, todo in queue:
        splits = {s for job in todo for s in job.method.splits if s in dataset.splits}
        for split in sorted(splits):
            features.images_together(dataset.name, split, dataset.part(split))
        for name in sorted({n for job in todo for n in getattr(job.section, "sets", ())}):
            if name in others:
                features.images_together(name, "test", others[name].test)


def _run_jobs(
    config: EvaluateConfig,
    features: Features,
    dataset: EvaluationDataset,
    todo: Sequence[Job],
    others: dict[str, EvaluationDataset],
) -> None:
    scale = None if config.logit_scale == "model" else float(config.logit_scale)
    subject = Subject(features, dataset, others, config.seed, scale)
    for job in todo:
        started = time.monotonic()
        outcomes = list(job.method.run(subject))
        rows = _rows(config, features, subject, job, outcomes, started)
        folder = config.output_folder
        with locked(folder):
            details = [
                d
                for o in outcomes
                for d in details_of(features.identity.checkpoint, dataset.name, o)
            ]
            publish_details(folder, details)
            if config.predictions:
                publish_predictions(folder, features.identity.checkpoint, dataset.name, outcomes)
            if job.method.name == "retrieval" or job.section.name == "zero_shot":
                shown = retrieval_examples(
                    features.identity.checkpoint,
                    dataset,
                    subject.split().part,
                    subject.scores(),
                    seed=config.seed,
                )
                publish_examples(folder, [shown])
            publish_results(folder, rows)
            publish_text(folder / "config.yaml", to_yaml(config))


def _rows(
    config: EvaluateConfig,
    features: Features,
    subject: Subject,
    job: Job,
    outcomes: Sequence[Outcome],
    started: float,
) -> list[Result]:
    identity, dataset = features.identity, subject.dataset
    rows: list[Result] = []
    for outcome in outcomes:
        shared: dict[str, Any] = {
            "checkpoint": identity.checkpoint,
            "checkpoint_digest": identity.digest,
            "samples_seen": identity.samples_seen,
            "dataset": dataset.name,
            "method": outcome.method,
            "shots": outcome.shots,
            "seeds": outcome.seeds,
            "chosen": outcome.chosen,
            "compat": outcome.compat,
            "prompt_digest": outcome.prompt_digest or dataset.prompt_digest,
            "data_digest": dataset.test.data_digest,
            "job_digest": job.digest,
        }
        rows += _metric_rows(config, outcome.metrics, shared, started)
    seconds = round(time.monotonic() - started, 3)
    return [row.model_copy(update={"seconds": seconds}) for row in rows]


def _metric_rows(
    config: EvaluateConfig, metrics: Sequence[AnyMetric], shared: dict[str, Any], started: float
) -> list[Result]:
    found = intervals(metrics, seed=config.seed, num_bootstrap=config.num_bootstrap)
    return [
        Result(
            **shared,
            metric=metric.name,
            value=metric.value,
            interval=interval,
            chance=metric.chance,
            n=metric.num_units,
            metric_definition=metric.definition,
            seed=config.seed,
            config_digest=digest(config),
            version=software_version(),
            seconds=round(time.monotonic() - started, 3),
        )
        for metric, interval in zip(metrics, found, strict=True)
    ]


def _finish(
    config: EvaluateConfig,
    checkpoints: Sequence[str],
    datasets: Datasets,
    absent: Sequence[Absent],
    part: tuple[int, int],
) -> None:
    """Add the average over the suite, and the baseline (by the first task of an array)."""
    folder = config.output_folder
    with locked(folder):
        rows = read_published(folder)
        found = [average_row(config, name, rows, absent) for name in checkpoints]
        publish_results(folder, [row for row in found if row is not None])
    if config.average is not None and not absent and part[1] == 1:
        for name, row in zip(checkpoints, found, strict=True):
            if row is None:
                print(why_no_average(config, name, rows), file=sys.stderr)
    if config.baseline is not None and part[0] == 0:
        new = _evaluate_baseline(config, config.baseline, [dataset for _, dataset in datasets])
        with locked(folder):
            publish_results(folder, new)


def _check(config: EvaluateConfig, checkpoints: Sequence[str]) -> None:
    if not checkpoints:
        raise UsageError(
            "no checkpoint to evaluate: give a run folder, or a model such as ViT-B-32/openai."
        )
    if BASELINE in checkpoints or len(set(checkpoints)) < len(checkpoints):
        raise UsageError(
            f"checkpoints: got {', '.join(checkpoints)}; expected each one once, and none called "
            f"{BASELINE}."
        )
    choose_device(config.device)
    for checkpoint in checkpoints:
        if not _is_utf8(checkpoint):
            raise UsageError(
                f"checkpoint {checkpoint!r}: expected a name in UTF-8, since results carry it. "
                "Rename the folder, or give a link to it."
            )
        find_model(checkpoint, config.weights)
    if config.baseline is not None:
        reference_tars(config.baseline.reference)
    _check_output(config.output_folder)
    # What stands there is merged with: better known now than after the work.
    read_published(config.output_folder)
    read_examples(config.output_folder)


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _check_output(folder: Path) -> None:
    """Raise UsageError where the folder of the results cannot be made or written to."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:
        there, is_writable = folder, False
    if not is_writable:
        raise UsageError(
            f"output: {folder} cannot be made or written to ({there} is no folder, or not "
            "writable). Give an `output` where results can be written."
        )


def _evaluate_baseline(
    config: EvaluateConfig, baseline: PixelBaselineConfig, datasets: Sequence[EvaluationDataset]
) -> list[Result]:
    started = time.monotonic()
    judged = [dataset for dataset in datasets if dataset.task in ("zero_shot", "retrieval")]
    found = find_neighbours(judged, baseline.reference, max_undecodable=config.max_undecodable)
    rows: list[Result] = []
    for neighbours in found:
        dataset, part = neighbours.dataset, neighbours.part
        scores = CaptionScores(neighbours.captions, candidate_texts(dataset, part))
        shared: dict[str, Any] = {
            "checkpoint": BASELINE,
            "checkpoint_digest": reference_digest(baseline.reference),
            "samples_seen": None,
            "dataset": dataset.name,
            "method": dataset.task,
            "prompt_digest": dataset.prompt_digest,
            "data_digest": part.data_digest,
        }
        rows += _metric_rows(config, _baseline_metrics(scores, dataset, part), shared, started)
    return rows


def _baseline_metrics(
    scores: CaptionScores, dataset: EvaluationDataset, part: Part
) -> Sequence[AnyMetric]:
    if dataset.prompts is not None:
        return accuracies(scores, part.labels(), len(dataset.class_names))
    return recalls(scores, part.image_of_caption_m)


def dry_run(config: EvaluateConfig, checkpoints: Sequence[str]) -> str:
    """Check datasets and checkpoints as far as can be without running; say what would be done."""
    _check(config, checkpoints)
    lines = []
    num_images = 0
    datasets, absent = load_datasets(config)
    left_out = []
    methods_of = methods_by_dataset(config, datasets)
    for (_, dataset), (methods, own_left_out) in zip(datasets, methods_of, strict=True):
        left_out += own_left_out
        num_images += len(dataset.test.samples)
        if dataset.prompts is not None:
            prompts = dataset.prompts
            each = f" x {len(prompts.templates)} templates" if prompts.templates else ""
            texts = f"{len(dataset.class_names):,} classes{each} = {prompts.num_prompts:,} prompts"
        else:
            texts = f"{len(dataset.test.captions):,} captions"
        lines.append(
            f"{dataset.name} ({dataset.task}): {len(dataset.test.samples):,} images, {texts}; "
            f"methods: {', '.join(methods) or 'none'}"
        )
    lines += [f"left out: {reason}" for reason in left_out]
    lines += [f"absent: {one.config.label}: {one.reason}" for one in absent]
    for checkpoint in checkpoints:
        source = find_model(checkpoint, config.weights)
        where = (
            "a local folder" if source.folder else "open_clip, downloaded where not in its cache"
        )
        lines.append(f"checkpoint {checkpoint}: {where}")
    noun = "checkpoint" if len(checkpoints) == 1 else "checkpoints"
    lines.append(
        f"{len(checkpoints)} {noun} x {num_images:,} images = "
        f"{len(checkpoints) * num_images:,} images to "
        f"encode in batches of {config.batch_size} on {choose_device(config.device)} "
        f"({config.precision}), less what is in the cache {config.cache}"
    )
    if config.baseline is not None:
        tars = reference_tars(config.baseline.reference)
        lines.append(f"pixel baseline: {len(tars)} reference tars in {config.baseline.reference}")
    lines.append(f"results go to {config.output_folder}")
    return "\n".join(lines)
