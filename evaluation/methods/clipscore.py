"""CLIPScore and RefCLIPScore: how well captions fit their images (Hessel et al., arXiv:2104.08718).

    CLIPScore     w max(s(image, "A photo depicts " + caption), 0), w = 2.5
    RefCLIPScore  harmonic mean of CLIPScore and max_r s(caption, reference r), as the authors' code
                  has it: the second is not cut at 0; the mean of 0 and 0 is 0 here (theirs: NaN)

Legend: n images with one candidate caption each, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset
from evaluation.methods.registry import Outcome
from evaluation.statistics import AnyMetric, Metric
from evaluation.subject import Subject
from pretrain.model.similarity import Similarity

WEIGHT = 2.5
PREFIX = "A photo depicts "


def paired_scores(left_nD: Tensor, right_nD: Tensor, similarity: Similarity) -> Tensor:
    """Return the similarity of row i with row i [n] of normalized features."""
    pairs = zip(torch.split(left_nD, 1), torch.split(right_nD, 1), strict=True)
    return torch.cat([similarity.scores(a, b)[0] for a, b in pairs])


def clip_scores(
    image_nD: Tensor, candidate_nD: Tensor, similarity: Similarity, weight: float = WEIGHT
) -> Tensor:
    """Return CLIPScore of each pair [n] of normalized features."""
    return weight * paired_scores(image_nD, candidate_nD, similarity).clamp(min=0)


def reference_scores(
    candidate_nD: Tensor, reference_mD: Tensor, count_n: Sequence[int], similarity: Similarity
) -> Tensor:
    """Return each candidate's highest similarity with its own references [n].

    The references stand one after another, `count_n` for each candidate.
    """
    groups = torch.split(reference_mD, list(count_n))
    pairs = zip(torch.split(candidate_nD, 1), groups, strict=True)
    return torch.stack([similarity.scores(one, own)[0].amax() for one, own in pairs])


def ref_clip_scores(clip_n: Tensor, reference_n: Tensor) -> Tensor:
    """Return the harmonic mean [n] of CLIPScore and the reference score."""
    total_n = clip_n + reference_n
    mean_n = 2 * clip_n * reference_n / total_n
    return torch.where(total_n == 0, torch.zeros_like(mean_n), mean_n)


class ClipScore:
    """CLIPScore of each image's first caption, as the suite runs it; the others are references."""

    name = "clip_score"
    splits: tuple[str, ...] = ("test",)

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs captions."""
        return None if dataset.test.captions else "captions"

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the mean CLIPScore, and RefCLIPScore over images with several captions."""
        test, similarity = subject.split(), subject.similarity
        owner_m = test.part.image_of_caption_m
        captioned, first_m = np.unique(owner_m, return_index=True)
        captions = [PREFIX + test.part.captions[i] for i in first_m]
        what = f"{subject.dataset.name}, prefixed"
        candidate_nD = similarity.embed_text(subject.features.texts(captions, what))
        image_nD = similarity.embed_image(test.raw_nD[torch.from_numpy(captioned)])
        score_n = clip_scores(image_nD, candidate_nD, similarity, self.weight)
        definition = f"mean {self.weight:g} max(similarity, 0), caption after {PREFIX!r}"
        metrics: list[AnyMetric] = [Metric(self.name, definition, None, score_n.double().numpy())]
        others_m = np.setdiff1d(np.arange(len(owner_m)), first_m)
        if len(others_m):
            # References carry the prefix too, as in the authors' code.
            texts = [PREFIX + test.part.captions[i] for i in others_m]
            reference_mD = similarity.embed_text(subject.features.texts(texts, what))
            count = np.bincount(
                np.searchsorted(captioned, owner_m[others_m]), minlength=len(captioned)
            )
            has = torch.from_numpy(count > 0)
            ref_n = reference_scores(
                candidate_nD[has], reference_mD, [int(c) for c in count[count > 0]], similarity
            )
            both_n = ref_clip_scores(score_n[has], ref_n)
            definition = "harmonic mean of CLIPScore and the best similarity with a reference"
            metrics.append(Metric("ref_clip_score", definition, None, both_n.double().numpy()))
        yield Outcome(metrics, self.name)
