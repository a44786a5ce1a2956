"""Image-caption selection: Winoground (arXiv:2204.03162), SugarCrepe (arXiv:2306.14610).

An instance has a images and b captions, image i belongs to caption i for i < m = min(a, b):
    text_acc    for all i < m, caption i is the best for image i
    image_acc   for all j < m, image j is the best for caption j
    acc         both
SugarCrepe has one image and two captions (the right one first): text_acc is its accuracy, and
image_acc says nothing. A right answer that is tied with t - 1 others counts 1/t, so that a constant
model scores chance (the authors' strict comparison counts it wrong).

Legend: k instances, a images, b captions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset, IntArray, Part
from evaluation.methods.registry import Outcome
from evaluation.statistics import AnyMetric, Metric
from evaluation.subject import Subject
from pretrain.model.similarity import Similarity


def instance_scores(image_kaD: Tensor, text_kbD: Tensor, similarity: Similarity) -> Tensor:
    """Return the scores of each instance's images against its captions [k, a, b]."""
    pairs = zip(image_kaD, text_kbD, strict=True)
    return torch.stack([similarity.scores(image, text) for image, text in pairs])


def credits(score_kab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return text_acc, image_acc and acc of each instance [k], in [0, 1]."""
    m = min(score_kab.shape[1:])
    right_km = torch.diagonal(score_kab, dim1=1, dim2=2)[:, :m]
    best_ka, tied_ka = _best(score_kab[:, :m], right_km[:, :, None])
    best_kb, tied_kb = _best(score_kab[:, :, :m].transpose(1, 2), right_km[:, :, None])
    text_k = (best_ka / tied_ka).prod(dim=1)
    image_k = (best_kb / tied_kb).prod(dim=1)
    return text_k, image_k, text_k * image_k


def _best(score_kmc: Tensor, right_km1: Tensor) -> tuple[Tensor, Tensor]:
    is_best = (score_kmc <= right_km1).all(dim=2).double()
    return is_best, (score_kmc == right_km1).sum(dim=2).clamp(min=1)


def chance(num_images: int, num_captions: int) -> tuple[float, float, float | None]:
    """Return the chance levels of text_acc, image_acc and acc (None where not worked out)."""
    m = min(num_images, num_captions)
    text, image = num_captions**-m, num_images**-m
    if m == 1:
        return text, image, text * image
    # two by two: of the 4! orders of four scores, 4 have both diagonal ones on top of all others
    both = 4 / math.factorial(4) if num_images == num_captions == 2 else None
    return text, image, both


def _instances(part: Part) -> dict[str, list[int]]:
    """Return the positions of the images of each instance."""
    found: dict[str, list[int]] = {}
    for position, name in enumerate(part.instances):
        found.setdefault(name, []).append(position)
    return found


class Selection:
    """Image-caption selection as the suite runs it."""

    name = "selection"
    splits: tuple[str, ...] = ("test",)

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs instances."""
        return None if dataset.task == "selection" else "the task selection (instances)"

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the accuracies, and the mean over categories where the dataset has groups."""
        test = subject.split()
        part, similarity = test.part, subject.similarity
        image_nD = similarity.embed_image(test.raw_nD)
        found: list[tuple[float, float, float]] = []
        shapes: list[tuple[int, int]] = []
        instances = _instances(part)
        texts = [
            [part.captions[i] for i in own] + [t for i in own for t in part.distractors[i]]
            for own in instances.values()
        ]
        flat = [text for own in texts for text in own]
        text_mD = similarity.embed_text(subject.features.texts(flat, subject.dataset.name))
        split_mD = torch.split(text_mD, [len(own) for own in texts])
        for own, text_bD in zip(instances.values(), split_mD, strict=True):
            score = instance_scores(image_nD[own][None], text_bD[None], similarity)
            text, image, both = credits(score)
            found.append((float(text), float(image), float(both)))
            shapes.append((len(own), len(text_bD)))
        first = [own[0] for own in instances.values()]
        groups = {name: g.index_n[first] for name, g in part.groups.items()}
        yield Outcome(_metrics(np.asarray(found), shapes, groups), self.name)


def _metrics(
    credit_k3: np.ndarray, shapes: list[tuple[int, int]], groups: dict[str, IntArray]
) -> list[AnyMetric]:
    levels = [chance(*shape) for shape in shapes]
    one_image = all(a == 1 for a, _ in shapes)
    metrics: list[AnyMetric] = []
    names = ("text_acc", "image_acc", "acc")
    for column, name in enumerate(names):
        if one_image and name != "text_acc":
            continue  # one image is always the best image
        known = [level[column] for level in levels]
        mean = None if None in known else float(np.mean([k for k in known if k is not None]))
        definition = f"{name} over instances; ties share the credit"
        metrics.append(Metric(name, definition, mean, credit_k3[:, column]))
        for group, index_k in groups.items():
            definition = f"{name}, mean over the groups of {group}; ties share the credit"
            metrics.append(
                Metric(f"{name}_by_{group}", definition, None, credit_k3[:, column], index_k)
            )
    return metrics
