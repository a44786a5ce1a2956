"""Run an evaluation: each checkpoint encodes each dataset once; methods run on the features.

    evaluate(config, ["runs/demo"]) -> rows, also in OUTPUT/results.jsonl; pictures in
    OUTPUT/examples.json

What is computed does not depend on batch size (but for the last bits of a feature), number of
workers, or what else is evaluated beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from configs.load import digest, to_yaml
from configs.publish import publish_text
from evaluation import retrieval, zero_shot
from evaluation.config import EvaluateConfig, PixelBaselineConfig
from evaluation.dataset import AnyDataset, ClassificationDataset, load_dataset
from evaluation.encoder import Encoder, choose_device, find_model, load_encoder
from evaluation.examples import publish_examples, read_examples, retrieval_examples
from evaluation.features import EncodeOptions, Features, encode_dataset
from evaluation.pixel_baseline import (
    CaptionScores,
    candidate_texts,
    find_neighbours,
    reference_digest,
    reference_tars,
)
from evaluation.ranking import Scores
from evaluation.result import BASELINE, Result, publish_results, read_published, software_version
from evaluation.statistics import Metric, intervals


@dataclass(frozen=True)
class Subject:
    """What the rows of a checkpoint have in common."""

    config: EvaluateConfig
    checkpoint: str
    digest: str
    samples_seen: int | None = None


def evaluate(config: EvaluateConfig, checkpoints: Sequence[str]) -> list[Result]:
    """Evaluate every checkpoint on every dataset; publish and return the rows, sorted.

    What a checkpoint gave is published before the next one is loaded, the baseline comes last.
    Raises UsageError, DataError or CheckpointError before anything is encoded where a dataset or a
    checkpoint is not what it should be.
    """
    _check(config, checkpoints)
    datasets = [load_dataset(dataset) for dataset in config.datasets]
    folder = config.output_folder
    results: list[Result] = []
    for checkpoint in checkpoints:
        encoder = load_encoder(checkpoint, device=config.device, precision=config.precision)
        done = [_evaluate_dataset(config, encoder, dataset) for dataset in datasets]
        rows = [row for dataset_rows, _ in done for row in dataset_rows]
        publish_results(folder, rows)
        publish_examples(folder, [shown for _, shown in done])
        publish_text(folder / "config.yaml", to_yaml(config))
        results += rows
    if config.baseline is not None:
        rows = _evaluate_baseline(config, config.baseline, datasets)
        publish_results(folder, rows)
        results += rows
    results.sort(key=lambda row: row.order)
    return results


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
        find_model(checkpoint)
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


def _metrics(scores: Scores, dataset: AnyDataset) -> list[Metric]:
    if isinstance(dataset, ClassificationDataset):
        return zero_shot.metrics(scores, dataset)
    return retrieval.metrics(scores, dataset)


def _scores(features: Features, dataset: AnyDataset) -> Scores:
    if isinstance(dataset, ClassificationDataset):
        return zero_shot.feature_scores(features)
    return retrieval.feature_scores(features)


def _evaluate_dataset(
    config: EvaluateConfig, encoder: Encoder, dataset: AnyDataset
) -> tuple[list[Result], dict[str, Any]]:
    started = time.monotonic()
    options = EncodeOptions(config.batch_size, config.num_workers, config.max_undecodable)
    features, dataset = encode_dataset(encoder, dataset, options)
    scores = _scores(features, dataset)
    subject = Subject(config, encoder.checkpoint, encoder.digest, encoder.samples_seen)
    rows = _rows(subject, dataset, _metrics(scores, dataset), started)
    shown = retrieval_examples(encoder.checkpoint, dataset, scores, seed=config.seed)
    return rows, shown


def _evaluate_baseline(
    config: EvaluateConfig, baseline: PixelBaselineConfig, datasets: Sequence[AnyDataset]
) -> list[Result]:
    started = time.monotonic()
    subject = Subject(config, BASELINE, reference_digest(baseline.reference))
    found = find_neighbours(datasets, baseline.reference, max_undecodable=config.max_undecodable)
    rows: list[Result] = []
    for neighbours in found:
        dataset = neighbours.dataset
        scores = CaptionScores(neighbours.captions, candidate_texts(dataset))
        rows += _rows(subject, dataset, _metrics(scores, dataset), started)
    return rows


def _rows(
    subject: Subject, dataset: AnyDataset, metrics: Sequence[Metric], started: float
) -> list[Result]:
    config = subject.config
    found = intervals(metrics, seed=config.seed, num_bootstrap=config.num_bootstrap)
    shared: dict[str, Any] = {
        "checkpoint": subject.checkpoint,
        "checkpoint_digest": subject.digest,
        "samples_seen": subject.samples_seen,
        "dataset": dataset.name,
        "task": dataset.task,
        "seed": config.seed,
        "prompt_digest": dataset.prompt_digest,
        "data_digest": dataset.data_digest,
        "config_digest": digest(config),
        "version": software_version(),
        "seconds": round(time.monotonic() - started, 3),
    }
    return [
        Result(
            **shared,
            metric=metric.name,
            value=metric.value,
            interval=interval,
            chance=metric.chance,
            n=len(metric.values_n),
            metric_definition=metric.definition,
        )
        for metric, interval in zip(metrics, found, strict=True)
    ]


def dry_run(config: EvaluateConfig, checkpoints: Sequence[str]) -> str:
    """Check datasets and checkpoints as far as can be without running; say what would be done."""
    _check(config, checkpoints)
    lines = []
    num_images = 0
    for dataset in (load_dataset(dataset) for dataset in config.datasets):
        num_images += len(dataset.samples)
        if isinstance(dataset, ClassificationDataset):
            num_classes, num_templates = len(dataset.class_names), len(dataset.templates)
            texts = (
                f"{num_classes:,} classes x {num_templates} templates = "
                f"{num_classes * num_templates:,} prompts"
            )
        else:
            texts = f"{len(dataset.captions):,} captions"
        lines.append(f"{dataset.name} ({dataset.task}): {len(dataset.samples):,} images, {texts}")
    for checkpoint in checkpoints:
        source = find_model(checkpoint)
        where = (
            "a local folder" if source.folder else "open_clip, downloaded where not in its cache"
        )
        lines.append(f"checkpoint {checkpoint}: {where}")
    lines.append(
        f"{len(checkpoints)} checkpoints x {num_images:,} images = "
        f"{len(checkpoints) * num_images:,} images to "
        f"encode in batches of {config.batch_size} on {choose_device(config.device)} "
        f"({config.precision})"
    )
    if config.baseline is not None:
        tars = reference_tars(config.baseline.reference)
        lines.append(f"pixel baseline: {len(tars)} reference tars in {config.baseline.reference}")
    lines.append(f"results go to {config.output_folder}")
    return "\n".join(lines)
