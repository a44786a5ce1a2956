"""The queue: every (checkpoint, dataset, method) once, what is done of it, and which part is ours.

A job's digest covers all that its rows depend on; rows with that digest in the results file mean
that it is done, so that a killed run goes on where it stopped, and tasks of an array share one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import UsageError, did_you_mean
from configs.registry import Variant
from evaluation.config import DatasetConfig, EvaluateConfig
from evaluation.dataset import EvaluationDataset
from evaluation.datasets import check_any
from evaluation.identity import Identity
from evaluation.methods.registry import Method
from evaluation.result import Result, software_version

FORMAT = 2  # of the methods' results: raised when a definition changes


@dataclass(frozen=True)
class Job:
    """One method on one dataset, for one checkpoint."""

    dataset: EvaluationDataset
    section: Variant
    method: Method
    digest: str


def job_digest(
    config: EvaluateConfig,
    identity: Identity,
    dataset: EvaluationDataset,
    section: Variant,
    method: Method,
    others: Mapping[str, EvaluationDataset],
) -> str:
    """Return the sha256 over checkpoint, data, prompts, method and the keys that change results."""
    used = [dataset.part(split).data_digest for split in method.splits if split in dataset.splits]
    sets = [others[name].test.data_digest for name in getattr(section, "sets", ())]
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": software_version(),
        "checkpoint": [identity.digest, identity.setting_digest],
        "data": [*used, *sets],
        "groups": {
            name: [group.names, hashlib.sha256(group.index_n.tobytes()).hexdigest()]
            for name, group in dataset.test.groups.items()
        },
        "prompts": dataset.prompt_digest,
        "method": section.model_dump(mode="json"),
        "keys": config.result_keys(),
    }
    if config.predictions:  # rows from a run without them are not all that is asked for
        content["predictions"] = True
    auxiliary = getattr(section, "auxiliary", None)
    if auxiliary is not None:
        from evaluation.methods.auxiliary import auxiliary_identity  # with torch

        content["auxiliary"] = auxiliary_identity(auxiliary)
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def runnable(
    config: EvaluateConfig,
    dataset: EvaluationDataset,
    sections: Sequence[Variant],
    others: Mapping[str, EvaluationDataset],
) -> tuple[list[tuple[Variant, Method]], list[str]]:
    """Return the methods that can run on a dataset, and why the others are left out.

    Raises UsageError where one asks for a dataset that is none of the run's, and ConfigError.
    """
    found, left_out = [], []
    labels = [section.label for section in config.datasets]
    for section in sections:
        method: Method = section.build()
        lacks = method.lacks(dataset)
        for name in getattr(section, "sets", ()):
            if name not in labels:
                raise UsageError(
                    f"{dataset.name}: {section.name} asks for the dataset {name!r}, which is not "
                    f"in this run{did_you_mean(name, labels)} It has {', '.join(labels)}."
                )
            if name not in others:
                lacks = lacks or f"the dataset {name}, which is absent"
        if lacks is None:
            found.append((section, method))
        else:
            left_out.append(f"{dataset.name}: {section.name} needs {lacks}")
    return found, left_out


def methods_by_dataset(
    config: EvaluateConfig, datasets: Sequence[tuple[DatasetConfig, EvaluationDataset]]
) -> list[tuple[list[str], list[str]]]:
    """Return the names of the methods that run on each dataset, and why the others do not.

    Raises DataError where there is no dataset at all, and what `runnable` raises.
    """
    check_any(config, len(datasets))
    others = {section.label: dataset for section, dataset in datasets}
    found = []
    for section, dataset in datasets:
        sections = config.method_sections(section, dataset.task)
        methods, left_out = runnable(config, dataset, sections, others)
        found.append(([own.name for own, _ in methods], left_out))
    return found


def jobs_of(
    config: EvaluateConfig,
    identity: Identity,
    dataset: EvaluationDataset,
    sections: Sequence[Variant],
    others: Mapping[str, EvaluationDataset],
) -> tuple[list[Job], list[str]]:
    """Return the jobs of a dataset, and why methods that cannot run on it are left out."""
    found, left_out = runnable(config, dataset, sections, others)
    jobs = [
        Job(
            dataset,
            section,
            method,
            job_digest(config, identity, dataset, section, method, others),
        )
        for section, method in found
    ]
    return jobs, left_out


def done_jobs(results: Iterable[Result], checkpoint: str) -> set[tuple[str, str]]:
    """Return (dataset, job digest) of what a results file already holds for a checkpoint."""
    return {(row.dataset, row.job_digest) for row in results if row.checkpoint == checkpoint}


def parse_part(text: str | None) -> tuple[int, int]:
    """Return (place, number) of `2/8`, or of the Slurm array task where the text is `slurm`."""
    if text is None:
        return 0, 1
    if text == "slurm":
        found = (os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT", "MIN"))
        task, count, first = (int(value) if value.isdecimal() else -1 for value in found)
        place, number = task - max(first, 0) + 1, count
    else:
        left, _, right = text.partition("/")
        place = int(left) if left.isdecimal() else -1
        number = int(right) if right.isdecimal() else -1
    if not 1 <= place <= number:
        raise UsageError(
            f"--part: got {text!r}; expected I/N with 1 <= I <= N, or `slurm` within a job array."
        )
    return place - 1, number
