"""CLIPScore and RefCLIPScore: how well captions fit their images (Hessel et al., arXiv:2104.08718).

    CLIPScore     w max(s(image, "A photo depicts " + caption), 0), w = 2.5
    RefCLIPScore  harmonic mean of CLIPScore and max_r s(caption, reference r), as the authors' code
                  has it: the second is not cut at 0; the mean of 0 and 0 is 0 here (theirs: NaN)

Legend: n images with one candidate caption each, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.model.similarity import Similarity

WEIGHT = 2.5
PREFIX = "A photo depicts "


def paired_scores(left_nD: Tensor, right_nD: Tensor, similarity: Similarity) -> Tensor:
    """Return the similarity of row i with row i [n] of normalized features."""
    pairs = zip(left_nD.split(1), right_nD.split(1), strict=True)
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
    groups = reference_mD.split(list(count_n))
    pairs = zip(candidate_nD.split(1), groups, strict=True)
    return torch.stack([similarity.scores(one, own)[0].amax() for one, own in pairs])


def ref_clip_scores(clip_n: Tensor, reference_n: Tensor) -> Tensor:
    """Return the harmonic mean [n] of CLIPScore and the reference score."""
    total_n = clip_n + reference_n
    mean_n = 2 * clip_n * reference_n / total_n
    return torch.where(total_n == 0, torch.zeros_like(mean_n), mean_n)
