"""The shape of the embedding space: modality gap, alignment, uniformity, effective rank.

    gap          |mean n(I) - mean n(T)| (Liang et al., arXiv:2203.02053)
    alignment    mean |x - y|^2 over pairs; uniformity log mean_{i<j} exp(-2 |x_i - x_j|^2)
                 (Wang and Isola, arXiv:2005.10242)
    cone         mean cosine of two different images (or texts)
    separability accuracy of a linear classifier of images against texts, on the half not fitted
    effective rank  exp of the entropy of the shares of the centred features' singular values
                 (Roy and Vetterli, 2007)

Legend: n images or pairs, m texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset
from evaluation.methods.linear_probe import fit
from evaluation.methods.registry import Outcome
from evaluation.statistics import AnyMetric, Metric, number
from evaluation.subject import Subject, held_out

MAX_ROWS = 5000  # for what compares all pairs


def gap_vector(image_nD: Tensor, text_mD: Tensor) -> Tensor:
    """Return the mean image less the mean text [D]."""
    return image_nD.mean(dim=0) - text_mD.mean(dim=0)


def gap(image_nD: Tensor, text_mD: Tensor) -> float:
    """Return the length of the gap vector."""
    return float(torch.linalg.vector_norm(gap_vector(image_nD, text_mD)))


def squared_lengths(x_nD: Tensor, y_nD: Tensor) -> Tensor:
    """Return |x - y|^2 of each pair [n]; alignment is their mean."""
    return ((x_nD - y_nD) ** 2).sum(dim=1)


def uniformity(x_nD: Tensor, t: float = 2.0) -> float:
    """Return log of the mean of exp(-t |x_i - x_j|^2) over i < j; needs two rows."""
    squared = torch.nn.functional.pdist(x_nD) ** 2
    return float(torch.logsumexp(-t * squared, dim=0) - torch.log(torch.tensor(len(squared))))


def mean_cosine(x_nD: Tensor) -> float:
    """Return the mean cosine of two different rows."""
    unit_nD = torch.nn.functional.normalize(x_nD, dim=1)
    n = len(unit_nD)
    return float(((unit_nD.sum(dim=0) ** 2).sum() - n) / (n * (n - 1)))


def effective_rank(x_nD: Tensor) -> float:
    """Return exp of the entropy of the shares of the singular values of the centred rows."""
    values = torch.linalg.svdvals(x_nD - x_nD.mean(dim=0))
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def separability(image_nD: Tensor, text_mD: Tensor, seed: int) -> float:
    """Return how well a linear classifier tells images from texts, on rows it was not fitted to."""
    feature = torch.cat([image_nD, text_mD])
    label_n = torch.cat([torch.zeros(len(image_nD)), torch.ones(len(text_mD))]).long()
    fitted, out = held_out(label_n, 0.5, seed)
    if len(torch.unique(label_n[fitted])) < 2 or not len(out):
        return float("nan")
    model = fit(feature[fitted].numpy(), label_n[fitted].numpy(), 1.0)
    return float(model.score(feature[out].numpy(), label_n[out].numpy()))


class GeometryReport:
    """The geometry of test images against their captions, or their class vectors."""

    name = "geometry"
    splits: tuple[str, ...] = ("test",)

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs two images."""
        return None if len(dataset.test.samples) > 1 else "two images"

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the report; of a large set, an even selection of MAX_ROWS images."""
        test = subject.split()
        image_nD = subject.similarity.embed_image(test.raw_nD)
        if subject.dataset.prompts is not None:
            text_mD, own = subject.class_vectors, test.part.labels()
        else:
            text_mD = subject.caption_features(test.part)
            own = np.unique(test.part.image_of_caption_m, return_index=True)[1]
        n = len(image_nD)
        at = torch.unique(torch.linspace(0, n - 1, min(n, MAX_ROWS)).long())
        image_nD, pair_nD = image_nD[at], text_mD[torch.from_numpy(own)[at]]
        text_mD = text_mD[:MAX_ROWS]
        lengths = squared_lengths(image_nD, pair_nD).double().numpy()
        found: list[AnyMetric] = [
            Metric("alignment", "mean |x - y|^2 of images and their texts", None, lengths)
        ]

        def add(name: str, definition: str, value: float) -> None:
            found.append(number(name, definition, value, len(image_nD)))

        add("modality_gap", "|mean image - mean text|", gap(image_nD, text_mD))
        for kind, feature in (("image", image_nD), ("text", text_mD)):
            if len(feature) < 2:
                continue
            add(f"uniformity_{kind}", "log mean exp(-2 |x_i - x_j|^2)", uniformity(feature))
            add(f"cone_{kind}", "mean cosine of two of them", mean_cosine(feature))
            add(f"effective_rank_{kind}", "exp entropy of singular values", effective_rank(feature))
        value = separability(image_nD, text_mD, subject.seed)
        if not np.isnan(value):
            add("separability", "linear classifier of image against text, held-out half", value)
        yield Outcome(found, self.name)
