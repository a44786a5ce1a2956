"""AMU-Tuning: an auxiliary encoder's linear head, fused by uncertainty (Tang et al., CVPR 2024,
arXiv:2404.08958).

    head     rows W_c = mean over the class's shots of n(f_a) (published divisor N / C), no bias
    aux      z_a = W n(f_a), standardized a sample: (z_a - mean) / std, unbiased over classes
    fusion   z = z_clip + alpha * u(z_clip) * z_a
    u        (kappa / kappa_0)^-rho, kappa the kurtosis of p = softmax(z_clip) over classes
    loss     lambda CE(z) + (1 - lambda) CE(z_a)          multi-branch training

kappa of a fully confident sample grows like C; the published kappa_0 = 250 belongs to C = 1000, so
by default kappa_0 = C / 4 here, which is the same at C = 1000.

Legend: b rows, C classes, A auxiliary width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evaluation.methods.few_shot import (
    FewShotTask,
    Fitted,
    Labelled,
    accuracy,
    correct,
)
from evaluation.methods.registry import Uncertainty
from evaluation.methods.training import train

PUBLISHED_KAPPA = 250.0
ALPHAS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # beside the one that it is trained with
_ENERGY_TEMPERATURE = 2.0
_SMALLEST_VARIANCE = 1e-24


@dataclass(frozen=True)
class Fusion:
    """How both branches are put together."""

    alpha: float = 0.5
    weight: float = 0.35  # lambda
    uncertainty: Uncertainty = "moment"
    power: float = 0.4  # rho
    kappa: float | None = None  # None: C / 4


def standardized(logit_bC: Tensor) -> Tensor:
    """Return each row less its mean, over its unbiased standard deviation; 0 for a constant row."""
    centred_bC = logit_bC - logit_bC.mean(dim=1, keepdim=True)
    # The variance is bounded, not the deviation: the root has no slope at 0.
    return centred_bC / logit_bC.var(dim=1, keepdim=True).clamp_min(_SMALLEST_VARIANCE).sqrt()


def uncertainty(
    logit_bC: Tensor, kind: Uncertainty, power: float, kappa: float | None = None
) -> Tensor:
    """Return u [b, 1] of zero-shot logits: how far the auxiliary branch is listened to."""
    p_bC = logit_bC.softmax(dim=1)
    if kind == "none":
        return torch.ones(len(p_bC), 1, dtype=p_bC.dtype)
    if kind == "moment":
        # At least what C values can have, which a row of equal probabilities gets too.
        floor = (1 - 1 / p_bC.shape[1]) ** 2
        kappa_b1 = (standardized(p_bC) ** 4).mean(dim=1, keepdim=True).clamp_min(floor)
        return (kappa_b1 / (p_bC.shape[1] / 4 if kappa is None else kappa)) ** -power
    if kind == "entropy":
        nats_b1 = torch.special.entr(p_bC).sum(dim=1, keepdim=True)
        return torch.exp(power * nats_b1 / torch.log(torch.tensor(float(p_bC.shape[1]))))
    if kind == "var":
        return p_bC.std(dim=1, keepdim=True)
    top_bC = p_bC.sort(dim=1, descending=True).values
    max_b1 = top_bC[:, :1]
    if kind == "energy":
        t = _ENERGY_TEMPERATURE
        return (t * torch.logsumexp(p_bC / t, dim=1, keepdim=True) + max_b1) ** -power
    below = {"max": 0 * max_b1, "max-min": top_bC[:, -1:]}
    last = min(5, top_bC.shape[1])
    return (max_b1 - below.get(kind, top_bC[:, last - 1 : last])) ** -power


def initial_head(aux_NA: Tensor, label_N: Tensor, num_classes: int) -> Tensor:
    """Return the head [C, A] whose rows are the classes' mean unit features, not normalized again.

    Each class's sum is divided by its own number of shots: N / C where classes have equally many.
    """
    unit_NA = torch.nn.functional.normalize(aux_NA, dim=1)
    head_CA = torch.zeros(num_classes, aux_NA.shape[1], dtype=aux_NA.dtype)
    head_CA.index_add_(0, label_N, unit_NA)
    return head_CA / torch.bincount(label_N, minlength=num_classes).clamp(min=1)[:, None]


def branches(
    logit_bC: Tensor, aux_bA: Tensor, head_CA: Tensor, fusion: Fusion
) -> tuple[Tensor, Tensor]:
    """Return the fused logits and the auxiliary ones, both [b, C]."""
    aux_bC = standardized(torch.nn.functional.normalize(aux_bA, dim=1) @ head_CA.T)
    factor = uncertainty(logit_bC, fusion.uncertainty, fusion.power, fusion.kappa)
    return logit_bC + fusion.alpha * factor * aux_bC, aux_bC


@dataclass(frozen=True)
class Slope:
    """The loss and its gradient in the head in closed form: autograd takes 1.6 times as long.

    What no step changes is computed once for all shots: u and the auxiliary features' directions.
    """

    logit_NC: Tensor
    unit_NA: Tensor
    factor_N1: Tensor
    label_N: Tensor
    fusion: Fusion

    @classmethod
    def of(cls, train: Labelled, fusion: Fusion) -> Slope:
        """Prepare the shots."""
        factor_N1 = uncertainty(train.logit_nC, fusion.uncertainty, fusion.power, fusion.kappa)
        unit_NA = torch.nn.functional.normalize(aux_of(train), dim=1)
        return cls(train.logit_nC, unit_NA, factor_N1, train.label_n, fusion)

    def at(self, head_CA: Tensor, index_b: Tensor) -> tuple[tuple[float, float, float], Tensor]:
        """Return the three losses of some rows (see `losses`), and the gradient [C, A]."""
        unit_bA, label_b = self.unit_NA[index_b], self.label_N[index_b]
        share_b1 = self.fusion.alpha * self.factor_N1[index_b]
        raw_bC = unit_bA @ head_CA.T
        variance_b1 = raw_bC.var(dim=1, keepdim=True).clamp_min(_SMALLEST_VARIANCE)
        aux_bC = standardized(raw_bC)
        log_fused_bC = (self.logit_NC[index_b] + share_b1 * aux_bC).log_softmax(dim=1)
        log_aux_bC = aux_bC.log_softmax(dim=1)
        row_b, weight = torch.arange(len(index_b)), self.fusion.weight
        merge = float(-log_fused_bC[row_b, label_b].mean())
        aux = float(-log_aux_bC[row_b, label_b].mean())
        # d CE / d logits = softmax - one-hot, of both losses by way of the standardized logits
        fused_bC, own_bC = log_fused_bC.exp(), log_aux_bC.exp()
        fused_bC[row_b, label_b] -= 1
        own_bC[row_b, label_b] -= 1
        by_aux_bC = (weight * share_b1 * fused_bC + (1 - weight) * own_bC) / len(index_b)
        along_b1 = (by_aux_bC * aux_bC).sum(dim=1, keepdim=True) / (raw_bC.shape[1] - 1)
        centred_bC = by_aux_bC - by_aux_bC.mean(dim=1, keepdim=True)
        by_raw_bC = (centred_bC - along_b1 * aux_bC) / variance_b1.sqrt()
        return (weight * merge + (1 - weight) * aux, merge, aux), by_raw_bC.T @ unit_bA


def losses(
    fused_bC: Tensor, aux_bC: Tensor, label_b: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and its two parts: CE of the fused and of the auxiliary logits."""
    merge = torch.nn.functional.cross_entropy(fused_bC, label_b)
    aux = torch.nn.functional.cross_entropy(aux_bC, label_b)
    return weight * merge + (1 - weight) * aux, merge, aux


class AmuTuning:
    """AMU-Tuning on cached features of both encoders."""

    name = "amu_tuning"

    def __init__(
        self, fusion: Fusion, *, epochs: int, batch_size: int, learning_rate: float
    ) -> None:
        self.fusion = fusion
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate

    def learned_heads(
        self, task: FewShotTask, seed: int | None
    ) -> tuple[list[Tensor], list[tuple[float, float, float]]]:
        """Return the head after every epoch (the start first), and every step's three losses."""
        slope = Slope.of(task.train, self.fusion)
        head_CA = initial_head(aux_of(task.train), slope.label_N, task.num_classes)
        head_CA.requires_grad_()
        heads = [head_CA.detach().clone()]
        steps: list[tuple[float, float, float]] = []

        def step(index_b: Tensor) -> float:
            found, head_CA.grad = slope.at(head_CA.detach(), index_b)
            steps.append(found)
            return found[0]

        train(
            [head_CA],
            step,
            num_rows=len(slope.label_N),
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed,
            after_epoch=lambda: heads.append(head_CA.detach().clone()),
        )
        return heads, steps

    def _fitted(self, head_CA: Tensor, alpha: float, epoch: int) -> Fitted:
        fusion = replace(self.fusion, alpha=alpha)

        def logits(part: Labelled) -> Tensor:
            return branches(part.logit_nC, aux_of(part), head_CA, fusion)[0]

        return Fitted(logits, {"alpha": alpha, "epoch": epoch})

    def fit(self, task: FewShotTask, validation: Labelled) -> Fitted:
        """Train to the end; choose alpha on validation, the one that it is trained with on ties."""
        heads, _ = self.learned_heads(task, task.seed)
        trained = self.fusion.alpha
        alphas = [trained, *(alpha for alpha in ALPHAS if alpha != trained)]
        choices = [self._fitted(heads[-1], alpha, self.epochs) for alpha in alphas]
        return max(choices, key=lambda fitted: accuracy(fitted.logits(validation), validation))

    def fit_published(self, task: FewShotTask, validation: Labelled, test: Labelled) -> Fitted:
        """Train with kappa_0 = 250; take the epoch that is best on test, as the authors do."""
        kappa = PUBLISHED_KAPPA if self.fusion.kappa is None else self.fusion.kappa
        published = AmuTuning(
            replace(self.fusion, kappa=kappa),
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )
        heads, _ = published.learned_heads(task, task.seed)
        choices = [
            published._fitted(head, self.fusion.alpha, epoch)
            for epoch, head in enumerate(heads)
            if epoch or not self.epochs
        ]
        return max(choices, key=lambda fitted: correct(fitted.logits(test), test.label_n))


def aux_of(part: Labelled) -> Tensor:
    """Return the auxiliary features of images."""
    assert part.aux_nA is not None, "refused by the method few_shot"
    return part.aux_nA
