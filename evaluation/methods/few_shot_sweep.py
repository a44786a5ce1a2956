"""Few-shot methods over shots and seeds. The only place that scores them against test labels.

For each (shots, seed) every learner gets the same shots and the same validation samples. In the
default mode nothing is chosen on test: a learner never sees its labels. `compat: published` follows
the authors: the whole validation split and, where they do so, test labels; its rows are marked.

A dataset without a val split gives validation samples from what the shots leave of train, at least
a quarter of each class's images (sampler.py).

Legend: n test images, s seeds, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from configs.errors import DataError
from configs.progress import progress
from configs.registry import Variant
from evaluation.dataset import EvaluationDataset, IntArray
from evaluation.methods.auxiliary import auxiliary_features
from evaluation.methods.few_shot import FewShotTask, Labelled
from evaluation.methods.registry import Learner, Outcome
from evaluation.methods.sampler import shots_and_validation
from evaluation.statistics import FloatArray, SeedMetric
from evaluation.subject import Subject, needs

MAX_VALIDATION = 4  # samples a class, CoOp's min(shots, 4)


@dataclass(frozen=True)
class Material:
    """All that a sweep draws from: train, val (None: from train) and test, each once."""

    train: Labelled
    validation: Labelled | None
    test: Labelled
    class_CD: Tensor


def rows_of(part: Labelled, index: IntArray) -> Labelled:
    """Return some images of a split."""
    at = torch.from_numpy(index)
    return Labelled(
        part.raw_nD[at],
        part.image_nD[at],
        part.label_n[at],
        part.logit_nC[at],
        None if part.aux_nA is None else part.aux_nA[at],
    )


def material_of(subject: Subject, auxiliary: str | None) -> Material:
    """Return the splits with zero-shot logits and, where asked for, auxiliary features."""

    def part(split: str) -> Labelled:
        aux_nA = None if auxiliary is None else auxiliary_features(auxiliary, subject, split)
        return subject.labelled(split, aux_nA=aux_nA)

    has_val = "val" in subject.dataset.splits
    validation = part("val") if has_val else None
    return Material(part("train"), validation, part("test"), subject.class_vectors)


def draw(
    material: Material, subject: Subject, shots: int, seed: int
) -> tuple[FewShotTask, Labelled, Labelled]:
    """Return the task of a seed, its few validation samples, and the whole validation split."""
    train_n = material.train.label_n.numpy()
    val_n = None if material.validation is None else material.validation.label_n.numpy()
    chosen, held_out = shots_and_validation(
        train_n, val_n, shots=shots, validation=min(shots, MAX_VALIDATION), seed=seed
    )
    pool = material.validation or material.train
    rest = np.setdiff1d(np.arange(len(train_n)), chosen)
    whole = material.validation or rows_of(material.train, rest)
    task = FewShotTask(
        rows_of(material.train, chosen), material.class_CD, subject.similarity, subject.scale, seed
    )
    missing = subject_classes_without(task)
    if missing:
        names = ", ".join(subject.dataset.class_names[label] for label in missing[:5])
        raise DataError(
            f"{subject.dataset.name}: {len(missing)} classes have no image in train ({names}); "
            "few-shot methods need one of each. Leave these classes out, or cut the splits "
            "otherwise."
        )
    return task, rows_of(pool, held_out), whole


def subject_classes_without(task: FewShotTask) -> list[int]:
    """Return the classes that have no shot."""
    count = torch.bincount(task.train.label_n, minlength=task.num_classes)
    return [int(label) for label in torch.nonzero(count == 0)[:, 0]]


class FewShotSweep:
    """The sweep as the suite runs it."""

    name = "few_shot"
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(
        self,
        sections: Sequence[Variant],
        shots: Sequence[int],
        seeds: int,
        validation: Literal["few", "all"],
        auxiliary: str | None,
    ) -> None:
        self.sections = sections
        self.shots = tuple(sorted(shots))
        self.seeds = tuple(range(1, seeds + 1))
        self.validation = validation
        self.auxiliary = auxiliary

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs labels and a train split."""
        return needs(dataset, "train")

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return, for each learner and number of shots, the accuracy over all seeds."""
        material = material_of(subject, self.auxiliary)
        learners: list[tuple[Variant, Learner]] = [(s, s.build()) for s in self.sections]
        total = len(self.shots) * len(self.seeds) * len(learners)
        label = f"few-shot on {subject.dataset.name}"
        with progress(label, total=total, unit="fits") as bar:
            for shots in self.shots:
                hits: list[list[FloatArray]] = [[] for _ in learners]
                chosen: list[dict[str, Any]] = [{} for _ in learners]
                for seed in self.seeds:
                    task, few, whole = draw(material, subject, shots, seed)
                    for place, (section, learner) in enumerate(learners):
                        if section.compat == "published":  # type: ignore[attr-defined]
                            fitted = learner.fit_published(task, whole, material.test)
                        else:
                            fitted = learner.fit(task, few if self.validation == "few" else whole)
                        with torch.no_grad():
                            guess = fitted.logits(material.test).argmax(dim=1)
                        hits[place].append((guess == material.test.label_n).double().numpy())
                        chosen[place][str(seed)] = fitted.chosen
                        bar.advance()
                for place, (section, learner) in enumerate(learners):
                    yield self._outcome(
                        subject, section, learner, shots, hits[place], chosen[place]
                    )

    def _outcome(
        self,
        subject: Subject,
        section: Variant,
        learner: Learner,
        shots: int,
        hits: list[FloatArray],
        chosen: dict[str, Any],
    ) -> Outcome:
        compat = section.compat  # type: ignore[attr-defined]
        definition = (
            f"share of test images right, mean over {len(hits)} seeds; the interval draws seeds "
            "and images"
        )
        if compat == "published":
            definition += "; chosen by the authors' protocol, which may look at test labels"
        chance = 1 / len(subject.dataset.class_names)
        metric = SeedMetric("top1", definition, chance, np.stack(hits))
        return Outcome([metric], learner.name, shots, self.seeds, chosen, compat)
