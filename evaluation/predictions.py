"""What each sample got, on disk, and paired comparisons of two checkpoints from it.

    OUTPUT/predictions/<key>.npz   values [n] or [s, n] of each metric, in the order of the samples;
                                   groups, where the metric averages over them; `identity` as JSON

Two checkpoints on one dataset see the same resamples (statistics.py), so that the interval of their
difference is paired: far narrower than what two separate intervals suggest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import DataError
from configs.publish import published_file
from evaluation.methods.registry import Outcome
from evaluation.statistics import Interval, Metric, SeedMetric, Statistic, paired_difference

FOLDER = "predictions"
NUM_BOOTSTRAP = 2000


def _key(checkpoint: str, dataset: str, method: str, shots: int | None, compat: str) -> str:
    text = json.dumps([checkpoint, dataset, method, shots, compat])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def publish_predictions(
    folder: Path, checkpoint: str, dataset: str, outcomes: Sequence[Outcome]
) -> None:
    """Write what each sample got under every metric that is a mean over samples."""
    for outcome in outcomes:
        arrays: dict[str, Any] = {}
        for metric in outcome.metrics:
            if isinstance(metric, Statistic):
                continue
            values_n = metric.values_sn if isinstance(metric, SeedMetric) else metric.values_n
            arrays[f"values/{metric.name}"] = values_n.astype(np.float32)
            if metric.groups_n is not None:
                arrays[f"groups/{metric.name}"] = metric.groups_n
        if not arrays:
            continue
        names = ("checkpoint", "dataset", "method", "shots", "compat")
        named = (checkpoint, dataset, outcome.method, outcome.shots, outcome.compat)
        identity = dict(zip(names, named, strict=True))
        key = _key(checkpoint, dataset, outcome.method, outcome.shots, outcome.compat)
        with published_file(folder / FOLDER / f"{key}.npz") as file:
            np.savez_compressed(file, identity=np.array(json.dumps(identity)), **arrays)


@dataclass(frozen=True)
class Prediction:
    """The metrics of one checkpoint on one dataset by one method."""

    checkpoint: str
    dataset: str
    method: str
    shots: int | None
    compat: str
    metrics: dict[str, Metric | SeedMetric]

    @property
    def what(self) -> tuple[str, str, int, str]:
        """What two checkpoints are compared on."""
        return self.dataset, self.method, self.shots or 0, self.compat


def read_predictions(folder: Path) -> list[Prediction]:
    """Return all predictions of a results folder."""
    return [_read(path) for path in sorted((folder / FOLDER).glob("*.npz"))]


def _read(path: Path) -> Prediction:
    try:
        with np.load(path, allow_pickle=False) as file:
            identity = json.loads(str(file["identity"]))
            metrics: dict[str, Metric | SeedMetric] = {}
            for key in file.files:
                kind, _, name = key.partition("/")
                if kind != "values":
                    continue
                values = file[key].astype(np.float64)
                groups = file[f"groups/{name}"] if f"groups/{name}" in file.files else None
                kind_of = SeedMetric if values.ndim == 2 else Metric
                metrics[name] = kind_of(name, "", None, values, groups)
            return Prediction(**identity, metrics=metrics)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a predictions file ({error}). Move it away.") from None


@dataclass(frozen=True)
class Comparison:
    """How far one checkpoint is above another on one metric."""

    dataset: str
    method: str
    shots: int | None
    metric: str
    baseline: str
    checkpoint: str
    difference: float
    interval: Interval
    p: float
    n: int


def compare(
    predictions: Sequence[Prediction], baseline: str, checkpoint: str, *, seed: int = 0
) -> list[Comparison]:
    """Return the paired difference, checkpoint less baseline, of every metric that both have."""
    of = {
        name: {p.what: p for p in predictions if p.checkpoint == name}
        for name in (baseline, checkpoint)
    }
    found = []
    for what in sorted(of[baseline].keys() & of[checkpoint].keys()):
        a, b = of[baseline][what], of[checkpoint][what]
        for name, metric in a.metrics.items():
            other = b.metrics.get(name)
            if other is None or other.num_units != metric.num_units:
                continue
            difference, interval, p = paired_difference(
                metric, other, seed=seed, num_bootstrap=NUM_BOOTSTRAP
            )
            found.append(
                Comparison(
                    a.dataset,
                    a.method,
                    a.shots,
                    name,
                    baseline,
                    checkpoint,
                    difference,
                    interval,
                    p,
                    metric.num_units,
                )
            )
    return found
