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

import torch
from torch import Tensor

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
