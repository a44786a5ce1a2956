"""GDA: Gaussian discriminant analysis beside the zero-shot logits ("A hard-to-beat baseline for
training-free CLIP-based adaptation", Wang et al., ICLR 2024, arXiv:2402.04087).

    logits = scale * s(x, t) + alpha * (x W + b)
    W = P mu^T,   b_c = log(1/C) - 1/2 mu_c P mu_c^T
    P = D * inverse((N - 1) S + tr(S) I)      empirical-Bayes ridge precision (Kubokawa, Srivastava)

mu_c: class means, S: the unbiased covariance of the features less their class means. alpha is the
first best of 1e-4 ... 1e2. With one view of one shot S = 0 and so P = 0: what is left is zero-shot.

New classes have no samples: each takes the k train features nearest to its text vector.

Legend: N train samples, C classes, D embedding width, q queries, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.methods.few_shot import (
    FewShotTask,
    Fitted,
    Labelled,
)
from pretrain.model.similarity import Similarity

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
NUM_NEIGHBOURS = 64
NUM_TEXT_COPIES = 16  # of the text vector, beside its neighbours, in a new class's mean
_RANK_RTOL = 1e-7  # below this share of the largest eigenvalue float32 covariances are noise


def class_means(feature_ND: Tensor, label_N: Tensor, num_classes: int) -> Tensor:
    """Return the mean of each class [C, D]; every class must have a sample."""
    total_CD = torch.zeros(num_classes, feature_ND.shape[1], dtype=feature_ND.dtype)
    total_CD.index_add_(0, label_N, feature_ND)
    return total_CD / torch.bincount(label_N, minlength=num_classes)[:, None]


def ridge_precision(covariance_DD: Tensor, divisor: float) -> Tensor:
    """Return D * inverse(divisor * S + tr(S) I) [D, D], 0 where S is 0."""
    width = len(covariance_DD)
    trace = covariance_DD.trace()
    if trace <= 0:
        return torch.zeros_like(covariance_DD)
    eye = torch.eye(width, dtype=covariance_DD.dtype)
    # Symmetric and, for S != 0, positive definite: a Cholesky factor instead of pinv.
    factor = torch.linalg.cholesky(divisor * covariance_DD + trace * eye)
    return width * torch.cholesky_inverse(factor)


def precision(feature_ND: Tensor, label_N: Tensor, mean_CD: Tensor) -> Tensor:
    """Return the precision [D, D] that all classes share."""
    # The one large product is in float32: centred unit features lose nothing that matters.
    centred_ND = (feature_ND - mean_CD[label_N]).float()
    num_rows = max(len(centred_ND), 2)
    covariance_DD = (centred_ND.T @ centred_ND).to(mean_CD.dtype) / (num_rows - 1)
    return ridge_precision(covariance_DD, num_rows - 1)


def discriminant(mean_CD: Tensor, precision_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Return W [D, C] and b [C] of equally likely classes."""
    weight_DC = precision_DD @ mean_CD.T
    half_C = 0.5 * (mean_CD * weight_DC.T).sum(dim=1)
    prior = torch.log(torch.tensor(1 / len(mean_CD), dtype=mean_CD.dtype))
    return weight_DC, prior - half_C


def fit_gaussians(
    feature_ND: Tensor, label_N: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return means, precision, W and b, in float64."""
    feature_ND = feature_ND.double()
    mean_CD = class_means(feature_ND, label_N, num_classes)
    precision_DD = precision(feature_ND, label_N, mean_CD)
    return mean_CD, precision_DD, *discriminant(mean_CD, precision_DD)


def choose_alpha(logit_qC: Tensor, gaussian_qC: Tensor, label_q: Tensor) -> tuple[float, Tensor]:
    """Return the first best alpha and the accuracy of each [7], by accuracy in [0, 1]."""
    found = torch.stack(
        [
            ((logit_qC + alpha * gaussian_qC).argmax(dim=1) == label_q).double().mean()
            for alpha in ALPHAS
        ]
    )
    return ALPHAS[int(found.argmax())], found


def base_discriminant(
    feature_ND: Tensor, label_N: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return W and b of the base classes: pinv of the mean of the classes' own covariances."""
    feature_ND = feature_ND.double()
    mean_CD = class_means(feature_ND, label_N, num_classes)
    width = feature_ND.shape[1]
    covariance_DD = torch.zeros(width, width, dtype=feature_ND.dtype)
    for label in range(num_classes):
        own_nD = feature_ND[label_N == label]
        if len(own_nD) > 1:  # one image says nothing of a covariance
            covariance_DD += torch.cov(own_nD.T) / num_classes
    precision_DD = torch.linalg.pinv(covariance_DD, rtol=_RANK_RTOL, hermitian=True)
    return discriminant(mean_CD, precision_DD)


def new_discriminant(
    feature_ND: Tensor, class_CD: Tensor, similarity: Similarity, k: int = NUM_NEIGHBOURS
) -> tuple[Tensor, Tensor, Tensor]:
    """Return means, W and b of classes that have no sample, from neighbours of their texts.

    A class's covariance is that of its neighbours around its text vector, with divisor k - 1, and
    its precision the ridge one; the precisions are averaged over the classes.
    """
    k = max(2, min(k, len(feature_ND)))
    near_Ck = similarity.scores(class_CD, feature_ND).topk(k, dim=1).indices
    feature_ND, class_CD = feature_ND.double(), class_CD.double()
    neighbour_CkD = feature_ND[near_Ck]
    copies = NUM_TEXT_COPIES
    mean_CD = (neighbour_CkD.sum(dim=1) + copies * class_CD) / (k + copies)
    width = feature_ND.shape[1]
    precision_DD = torch.zeros(width, width, dtype=feature_ND.dtype)
    for label in range(len(class_CD)):
        centred_kD = neighbour_CkD[label] - class_CD[label]
        scatter_DD = centred_kD.T @ centred_kD
        precision_DD += ridge_precision(scatter_DD / (k - 1), k - 1) / len(class_CD)
    return mean_CD, *discriminant(mean_CD, precision_DD)


class Gda:
    """GDA as a few-shot method."""

    name = "gda"

    def fit(self, task: FewShotTask, validation: Labelled) -> Fitted:
        """Fit in closed form; choose alpha on validation."""
        _, _, weight_DC, bias_C = fit_gaussians(
            task.train.image_nD, task.train.label_n, task.num_classes
        )

        def gaussian(labelled: Labelled) -> Tensor:
            return labelled.image_nD @ weight_DC.float() + bias_C.float()

        alpha, _ = choose_alpha(validation.logit_nC, gaussian(validation), validation.label_n)
        return Fitted(lambda part: part.logit_nC + alpha * gaussian(part), {"alpha": alpha})

    def fit_published(self, task: FewShotTask, validation: Labelled, test: Labelled) -> Fitted:
        """Fit; the driver hands the whole validation split, as the authors' code takes it."""
        return self.fit(task, validation)


def only_classes(part: Labelled, classes: Sequence[int]) -> Labelled:
    """Return the images of these classes, relabelled from 0, with those classes' logits."""
    new_label = torch.full((int(part.logit_nC.shape[1]),), -1, dtype=torch.int64)
    new_label[torch.tensor(classes)] = torch.arange(len(classes))
    keep = new_label[part.label_n] >= 0
    return Labelled(
        part.raw_nD[keep],
        part.image_nD[keep],
        new_label[part.label_n[keep]],
        part.logit_nC[keep][:, torch.tensor(classes)],
        None if part.aux_nA is None else part.aux_nA[keep],
    )


def base_to_new(
    task: FewShotTask, validation: Labelled, base: Sequence[int]
) -> tuple[Fitted, Fitted]:
    """Learn the base classes from their shots, the others from their texts.

    Return what is fitted for the base classes and, with the same alpha, for the new ones; each
    takes images as `only_classes` gives them. alpha is chosen on the base classes' validation.
    """
    new = [label for label in range(task.num_classes) if label not in set(base)]
    train, held_out = only_classes(task.train, base), only_classes(validation, base)
    base_head = base_discriminant(train.image_nD, train.label_n, len(base))
    gaussian = held_out.image_nD.double() @ base_head[0] + base_head[1]
    alpha, _ = choose_alpha(held_out.logit_nC, gaussian, held_out.label_n)
    _, *new_head = new_discriminant(
        train.image_nD, task.class_CD[torch.tensor(new)], task.similarity
    )

    def fitted(weight_DC: Tensor, bias_C: Tensor) -> Fitted:
        def logits(part: Labelled) -> Tensor:
            return part.logit_nC + alpha * (part.image_nD.double() @ weight_DC + bias_C)

        return Fitted(logits, {"alpha": alpha})

    return fitted(*base_head), fitted(*new_head)


def harmonic_mean(base: float, new: float) -> float:
    """Return H = 2 B N / (B + N), 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0
