"""The mean over a suite's main metrics, and how results compare with published tables.

DataComp's average is the plain mean over the 38 tasks of its list that have a main metric (FairFace
and UTKFace have none). An average over fewer datasets is another number: it is not given.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import DataError, did_you_mean
from configs.load import digest
from evaluation.config import DatasetConfig, EvaluateConfig
from evaluation.datasets import Absent
from evaluation.result import Result, software_version

DATASET = "(suite)"
METHOD = "average"
PUBLISHED_AVERAGE = "Average perf. on 38 datasets"
_DEFAULT = {
    "zero_shot": "zero_shot/top1",
    "retrieval": "retrieval/mean_recall@1",
    "selection": "selection/acc",
    "association": "association/jaccard_10_12",
}


def main_metric(section: DatasetConfig) -> str:
    """Return METHOD/METRIC of a dataset's main metric."""
    return section.main_metric or _DEFAULT[section.task or "zero_shot"]


def main_values(
    config: EvaluateConfig, checkpoint: str, rows: Sequence[Result]
) -> dict[str, float]:
    """Return the main metric of each dataset of the suite that has a row."""
    known = {
        (row.dataset, f"{row.method}/{row.metric}"): row.value
        for row in rows
        if row.checkpoint == checkpoint and row.shots is None
    }
    wanted = {section.label: (section.label, main_metric(section)) for section in config.datasets}
    return {name: known[key] for name, key in wanted.items() if key in known}


def why_no_average(config: EvaluateConfig, checkpoint: str, rows: Sequence[Result]) -> str:
    """Say which main metrics are missing for the average that the suite asks for."""
    values = main_values(config, checkpoint, rows)
    sections = [section for section in config.datasets if section.label not in values]
    missing = ", ".join(f"{section.label} {main_metric(section)}" for section in sections)
    return (
        f"no {config.average} for {checkpoint}: there is no {missing}. Run that method, or set the "
        "dataset's `task` or `main_metric`."
    )


def mean_of(values: Mapping[str, float]) -> float:
    """Return the unweighted mean over datasets."""
    return float(np.mean(list(values.values())))


def average_row(
    config: EvaluateConfig, checkpoint: str, rows: Sequence[Result], absent: Sequence[Absent]
) -> Result | None:
    """Return the suite's average; None where it asks for none, or a dataset has no main metric."""
    if config.average is None or absent:
        return None
    values = main_values(config, checkpoint, rows)
    if len(values) < len(config.datasets):
        return None
    own = [row for row in rows if row.checkpoint == checkpoint and row.dataset in values]
    digests = sorted({(row.dataset, row.data_digest) for row in own})
    return Result(
        checkpoint=checkpoint,
        checkpoint_digest=own[0].checkpoint_digest,
        samples_seen=own[0].samples_seen,
        dataset=DATASET,
        method=METHOD,
        metric=config.average,
        value=mean_of(values),
        interval=None,
        chance=None,
        n=len(values),
        seed=config.seed,
        metric_definition=f"unweighted mean of the main metrics of {len(values)} datasets",
        prompt_digest=None,
        data_digest=hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        config_digest=digest(config),
        version=software_version(),
        seconds=0.0,
    )


@dataclass(frozen=True)
class PublishedRow:
    """A model of a published table: scores by the table's names of the datasets."""

    name: str
    pretrained: str
    scores: dict[str, float]

    @property
    def checkpoint(self) -> str:
        """The model as `pairmill evaluate` names it."""
        return f"{self.name}/{self.pretrained}"


def read_published_table(path: Path) -> list[PublishedRow]:
    """Read a table like open_clip's openclip_results.csv: name, pretrained, a column a dataset."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}.") from None
    if not rows or not {"name", "pretrained"} <= rows[0].keys():
        raise DataError(
            f"{path}: expected a CSV with the columns name, pretrained and one a dataset."
        )
    return [
        PublishedRow(
            row["name"],
            row["pretrained"],
            {k: float(v) for k, v in row.items() if k and _is_score(k, v)},
        )
        for row in rows
    ]


def _is_score(column: str, text: str | None) -> bool:
    try:
        return "(" not in column and text is not None and 0 <= float(text) <= 1
    except ValueError:
        return False


def published_average(row: PublishedRow, config: EvaluateConfig) -> float:
    """Return the mean of a published row over the suite's datasets, by our aggregation.

    Raises DataError where the row lacks one of them.
    """
    titles = [section.title or section.label for section in config.datasets]
    missing = [title for title in titles if title not in row.scores]
    if missing:
        raise DataError(f"{row.checkpoint}: the table has no score for {', '.join(missing)}.")
    return mean_of({title: row.scores[title] for title in titles})


@dataclass(frozen=True)
class Lint:
    """One dataset of ours against the published number."""

    checkpoint: str
    dataset: str
    ours: float | None
    published: float | None
    note: str

    @property
    def is_bad(self) -> bool:
        """Whether somebody should look."""
        return bool(self.note)


def lint(
    rows: Sequence[Result],
    config: EvaluateConfig,
    table: Sequence[PublishedRow],
    *,
    model: str | None = None,
    tolerance: float = 0.005,
) -> list[Lint]:
    """Compare the main metrics of every checkpoint with its published row.

    A checkpoint is found by its open_clip name; `model` (NAME/TAG) says which row it is otherwise.
    Notes: further than `tolerance` from the published number; below the random score; no number.
    """
    published = {row.checkpoint: row for row in table}
    checkpoints = sorted({row.checkpoint for row in rows if row.method != METHOD})
    found: list[Lint] = []
    for checkpoint in checkpoints:
        name = model or checkpoint
        if name not in published and model is not None:
            raise DataError(f"the table has no model {name!r}{did_you_mean(name, published)}")
        reference = published.get(name)
        values = main_values(config, checkpoint, rows)
        for section in config.datasets:
            ours = values.get(section.label)
            title = section.title or section.label
            theirs = None if reference is None else reference.scores.get(title)
            note = _note(section, ours, theirs, tolerance)
            found.append(Lint(checkpoint, section.label, ours, theirs, note))
    return found


def _note(
    section: DatasetConfig, ours: float | None, theirs: float | None, tolerance: float
) -> str:
    if ours is None:
        return "no result"
    if section.random_score is not None and ours < section.random_score * 0.9:
        return f"below the random score {section.random_score:.4f}: class order? prompts?"
    if theirs is None:
        return ""
    if abs(ours - theirs) > tolerance:
        return f"differs by {ours - theirs:+.4f}, allowed {tolerance:.4f}"
    return ""


def lint_table(found: Sequence[Lint]) -> str:
    """Return the comparison for people."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{value:.4f}"

    lines = [f"{'dataset':<44} {'ours':>7} {'published':>9}  note"]
    for one in found:
        said = one.note or ("no published number" if one.published is None else "ok")
        lines.append(f"{one.dataset:<44} {cell(one.ours):>7} {cell(one.published):>9}  {said}")
    bad = sum(one.is_bad for one in found)
    alone = sum(one.published is None and not one.is_bad for one in found)
    as_published = len(found) - bad - alone
    lines.append(
        f"{as_published} as published, {alone} without a published number, {bad} to look at"
    )
    return "\n".join(lines)
