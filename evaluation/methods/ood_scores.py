"""Out-of-distribution scores of features, logits and a linear head; higher is more in-distribution.

    msp, max_logit, energy   of logits (Hendrycks 2017, 2022; Liu 2020)
    react                    features clipped at a quantile of the train features, then energy
    vim, residual            what a feature has outside the train data's principal space (Wang 2022)
    grad_norm                |f|_1 * sum_c |C p_c - 1|, the gradient of KL(uniform, p) (Huang 2021)
    mahalanobis              to the nearest class mean, one covariance (Lee 2018)
    kl_matching              to the nearest class's mean softmax (Hendrycks 2022)
    knn                      the k-th nearest train feature, unit length, squared (Sun 2022)
    mcm                      the highest softmax of similarity / temperature (Ming 2022)

A CLIP model's head is its similarity with the class vectors, whose origin is 0. The suite computes
in float64: MCM's scores stand within 1e-4 of 1/C, where float32 would tie.

Legend: n images, N train images, C classes, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor

REACT_QUANTILE = 0.99
_CHUNK_ELEMENTS = 1 << 24  # distances held at once (128 MiB of float64)


class Logits(Protocol):
    """What gives logits of features, and the feature at which no class is preferred."""

    def logits(self, feature_nD: Tensor) -> Tensor:
        """Return logits [n, C]."""
        ...

    def origin(self) -> Tensor:
        """Return the point [D] that ViM measures from."""
        ...


@dataclass(frozen=True)
class Head:
    """A linear classifier: logits = f W^T + b."""

    weight_CD: Tensor
    bias_C: Tensor

    def origin(self) -> Tensor:
        """Return -pinv(W) b."""
        origin_D: Tensor = -torch.linalg.pinv(self.weight_CD) @ self.bias_C
        return origin_D

    def logits(self, feature_nD: Tensor) -> Tensor:
        """Return logits [n, C]."""
        logit_nC: Tensor = feature_nD @ self.weight_CD.T + self.bias_C
        return logit_nC


def msp(logit_nC: Tensor) -> Tensor:
    """Return the highest softmax probability."""
    return logit_nC.softmax(dim=1).amax(dim=1)


def max_logit(logit_nC: Tensor) -> Tensor:
    """Return the highest logit."""
    return logit_nC.amax(dim=1)


def energy(logit_nC: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T logsumexp(z / T), the negative free energy."""
    return temperature * torch.logsumexp(logit_nC / temperature, dim=1)


def mcm(similarity_nC: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the maximum concept matching score of cosines."""
    return msp(similarity_nC / temperature)


def negative_entropy(similarity_nC: Tensor, temperature: float = 1.0) -> Tensor:
    """Return minus the entropy of softmax(s / T), in nats."""
    p_nC = (similarity_nC / temperature).softmax(dim=1).numpy()
    return -torch.from_numpy(entr(p_nC / p_nC.sum(axis=1, keepdims=True)).sum(axis=1))


def variance(similarity_nC: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the population variance of softmax(s / T) over classes."""
    p_nC = (similarity_nC / temperature).softmax(dim=1).numpy()
    return torch.from_numpy(np.var(p_nC, axis=1))


def react_clip(train_ND: Tensor, quantile: float = REACT_QUANTILE) -> float:
    """Return ReAct's ceiling: the quantile of all entries of the train features (linear)."""
    # Not torch.quantile: it refuses more than 2 ** 24 entries.
    value = train_ND.flatten().sort().values
    place = quantile * (len(value) - 1)
    low = int(place)
    high = min(low + 1, len(value) - 1)
    return float(torch.lerp(value[low], value[high], place - low))


def react(feature_nD: Tensor, head: Logits, ceiling: float) -> Tensor:
    """Return the energy of features clipped at the ceiling."""
    return energy(head.logits(feature_nD.clamp(max=ceiling)))


def principal_dimension(width: int) -> int:
    """Return how many dimensions ViM's principal space has (the authors' rule)."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


@dataclass(frozen=True)
class Vim:
    """Virtual-logit matching: the origin u, the residual space R [D, D - dim], and alpha."""

    origin_D: Tensor
    residual_DR: Tensor
    alpha: float

    def residual(self, feature_nD: Tensor) -> Tensor:
        """Return |(f - u) R|, the length outside the principal space."""
        outside_nR = (feature_nD - self.origin_D) @ self.residual_DR
        length_n: Tensor = torch.linalg.vector_norm(outside_nR, dim=1)
        return length_n

    def score(self, feature_nD: Tensor, logit_nC: Tensor) -> Tensor:
        """Return logsumexp z - alpha |(f - u) R|."""
        return energy(logit_nC) - self.alpha * self.residual(feature_nD)


def fit_vim(train_ND: Tensor, head: Logits, dimension: int | None = None) -> Vim:
    """Fit ViM on train features; the residual space comes from eigh of the second moment."""
    origin_D = head.origin()
    shifted_ND = train_ND - origin_D
    width = train_ND.shape[1]
    dimension = principal_dimension(width) if dimension is None else dimension
    _, vectors = torch.linalg.eigh(shifted_ND.T @ shifted_ND / len(train_ND))  # ascending
    space = Vim(origin_D, vectors[:, : width - dimension], 1.0)
    alpha = head.logits(train_ND).amax(dim=1).mean() / space.residual(train_ND).mean()
    return Vim(origin_D, space.residual_DR, float(alpha))


def grad_norm(feature_nD: Tensor, logit_nC: Tensor) -> Tensor:
    """Return |f|_1 * sum_c |C p_c - 1|."""
    p_nC = logit_nC.softmax(dim=1)
    return feature_nD.abs().sum(dim=1) * (p_nC.shape[1] * p_nC - 1).abs().sum(dim=1)


@dataclass(frozen=True)
class Gaussians:
    """Class means and the precision that they share."""

    mean_CD: Tensor
    precision_DD: Tensor

    def score(self, feature_nD: Tensor) -> Tensor:
        """Return minus the squared Mahalanobis distance to the nearest class mean."""
        # (f - m) P (f - m)^T = f P f^T - 2 f P m^T + m P m^T; float64 keeps the cancellation exact
        mapped_nD = feature_nD @ self.precision_DD
        own_n = (mapped_nD * feature_nD).sum(dim=1, keepdim=True)
        mean_C = ((self.mean_CD @ self.precision_DD) * self.mean_CD).sum(dim=1)
        return -(own_n - 2 * mapped_nD @ self.mean_CD.T + mean_C).amin(dim=1)


def fit_gaussians(train_ND: Tensor, label_N: Tensor) -> Gaussians:
    """Fit class means and the class-centred empirical covariance (divisor N), inverted by pinv."""
    present, index_N = torch.unique(label_N, return_inverse=True)
    mean_CD = torch.zeros(len(present), train_ND.shape[1], dtype=train_ND.dtype)
    mean_CD.index_add_(0, index_N, train_ND)
    mean_CD /= torch.bincount(index_N)[:, None]
    centred_ND = train_ND - mean_CD[index_N]
    covariance_DD = centred_ND.T @ centred_ND / len(train_ND)
    # Directions without spread carry no distance: float32 features leave noise of 1e-7 there.
    return Gaussians(mean_CD, torch.linalg.pinv(covariance_DD, rtol=1e-7, hermitian=True))


def class_profiles(train_logit_NC: Tensor) -> Tensor:
    """Return the mean softmax of the train images predicted as each class [K, C].

    A class that is never predicted has no profile, and is left out.
    """
    p_NC = train_logit_NC.softmax(dim=1)
    predicted, index_N = torch.unique(p_NC.argmax(dim=1), return_inverse=True)
    total = torch.zeros(len(predicted), p_NC.shape[1], dtype=p_NC.dtype)
    return total.index_add_(0, index_N, p_NC) / torch.bincount(index_N)[:, None]


def kl_matching(logit_nC: Tensor, profile_KC: Tensor) -> Tensor:
    """Return minus the smallest KL(p, profile)."""
    log_p_nC = logit_nC.log_softmax(dim=1)
    p_nC = log_p_nC.exp()
    floor = torch.finfo(profile_KC.dtype).tiny
    cross_nK = p_nC @ profile_KC.clamp(min=floor).log().T
    return -((p_nC * log_p_nC).sum(dim=1, keepdim=True) - cross_nK).amin(dim=1)


def knn(feature_nD: Tensor, train_ND: Tensor, k: int) -> Tensor:
    """Return minus the k-th smallest squared distance between unit features."""
    unit_nD, unit_ND = _unit(feature_nD), _unit(train_ND)
    k = min(k, len(train_ND))
    length_N = (unit_ND**2).sum(dim=1)
    parts = []
    for chunk in torch.split(unit_nD, max(1, _CHUNK_ELEMENTS // len(train_ND))):
        squared = (chunk**2).sum(dim=1, keepdim=True) + length_N - 2 * chunk @ unit_ND.T
        parts.append(squared.kthvalue(k, dim=1).values)
    return -torch.cat(parts)


def _unit(feature_nD: Tensor) -> Tensor:
    unit_nD: Tensor = feature_nD / torch.linalg.vector_norm(feature_nD, dim=1, keepdim=True)
    return unit_nD + 1e-10
