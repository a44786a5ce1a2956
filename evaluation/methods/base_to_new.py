"""Base-to-new generalization of GDA: half of the classes have shots, the others only their texts.

The first ceil(C/2) labels are base. Each half is judged among its own classes; H is the harmonic
mean of both accuracies (CoCoOp, arXiv:2203.05557). alpha is chosen on the base classes' validation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from evaluation.dataset import EvaluationDataset
from evaluation.methods.few_shot_sweep import draw, material_of
from evaluation.methods.gda import base_to_new, harmonic_mean, only_classes
from evaluation.methods.registry import Outcome
from evaluation.methods.sampler import base_and_new
from evaluation.statistics import FloatArray, SeedMetric, number
from evaluation.subject import Subject, needs


class BaseToNew:
    """The protocol as the suite runs it."""

    name = "base_to_new"
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(self, shots: int, seeds: int) -> None:
        self.shots = shots
        self.seeds = tuple(range(1, seeds + 1))

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs labels, a train split, and at least four classes."""
        if dataset.task == "zero_shot" and len(dataset.class_names) < 4:
            return "at least four classes"
        return needs(dataset, "train")

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the accuracies of base and new classes, and their harmonic mean."""
        material = material_of(subject, None)
        num_classes = len(subject.dataset.class_names)
        halves = [[int(c) for c in half] for half in base_and_new(np.arange(num_classes))]
        parts = [only_classes(material.test, half) for half in halves]
        hits: tuple[list[FloatArray], list[FloatArray]] = ([], [])
        chosen: dict[str, Any] = {}
        for seed in self.seeds:
            task, few, _ = draw(material, subject, self.shots, seed)
            fitted = base_to_new(task, few, halves[0])
            chosen[str(seed)] = fitted[0].chosen
            for place, part in enumerate(parts):
                guess = fitted[place].logits(part).argmax(dim=1)
                hits[place].append((guess == part.label_n).to(torch.float64).numpy())
        metrics = [
            SeedMetric(
                f"{name}_top1",
                f"share of images of {name} classes right among them, mean over seeds",
                1 / len(half),
                np.stack(own),
            )
            for name, half, own in zip(("base", "new"), halves, hits, strict=True)
        ]
        mean = harmonic_mean(metrics[0].value, metrics[1].value)
        count = sum(metric.num_units for metric in metrics)
        joint = number("harmonic_mean", "2 B N / (B + N) of both accuracies", mean, count)
        yield Outcome([*metrics, joint], self.name, self.shots, self.seeds, chosen)
