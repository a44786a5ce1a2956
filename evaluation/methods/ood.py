"""Out-of-distribution detection of zero-shot classification, as the suite runs it.

The dataset is in-distribution, other datasets of the run are not. Scores that need training
statistics (ReAct, ViM, Mahalanobis, KL-matching, KNN) are fitted on the train split, and left out
where there is none. AUROC, AUPR and FPR95 each with its definition (ood_metrics.py).

Legend: n ID images, m OOD images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset
from evaluation.methods import ood_metrics as metrics
from evaluation.methods import ood_scores as scores
from evaluation.methods.registry import FprDefinition, Outcome
from evaluation.statistics import AnyMetric, FloatArray, Statistic
from evaluation.subject import Subject, has_labels
from pretrain.model.similarity import Similarity

Score = Callable[[Tensor], Tensor]
NUM_CURVE_POINTS = 60


@dataclass(frozen=True)
class SimilarityHead:
    """The model's similarity with class vectors as a classifier."""

    class_CD: Tensor
    similarity: Similarity
    scale: float

    def logits(self, feature_nD: Tensor) -> Tensor:
        """Return scale * similarity [n, C]."""
        return self.scale * self.similarity.scores(feature_nD, self.class_CD)

    def origin(self) -> Tensor:
        """Return 0: there is no bias."""
        return torch.zeros(self.class_CD.shape[1], dtype=self.class_CD.dtype)


def zero_shot_scores(head: SimilarityHead, temperature: float) -> dict[str, Score]:
    """Return the scores that need no training data."""
    return {
        "msp": lambda f: scores.msp(head.logits(f)),
        "max_logit": lambda f: scores.max_logit(head.logits(f)),
        "energy": lambda f: scores.energy(head.logits(f)),
        "grad_norm": lambda f: scores.grad_norm(f, head.logits(f)),
        "mcm": lambda f: scores.mcm(head.logits(f) / head.scale, temperature),
    }


def fitted_scores(
    head: SimilarityHead, train_ND: Tensor, label_N: Tensor, knn_k: int
) -> dict[str, Score]:
    """Return the scores that are fitted on train features."""
    knn_k = min(knn_k, len(train_ND))  # the score's name says which was taken
    ceiling = scores.react_clip(train_ND)
    vim = scores.fit_vim(train_ND, head)
    gaussians = scores.fit_gaussians(train_ND, label_N)
    profile_KC = scores.class_profiles(head.logits(train_ND))
    return {
        "react": lambda f: scores.react(f, head, ceiling),
        "vim": lambda f: vim.score(f, head.logits(f)),
        "residual": lambda f: -vim.residual(f),
        "mahalanobis": gaussians.score,
        "kl_matching": lambda f: scores.kl_matching(head.logits(f), profile_KC),
        f"knn{knn_k}": lambda f: scores.knn(f, train_ND, knn_k),
    }


class OutOfDistribution:
    """Every score against every OOD set."""

    name = "ood"
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(
        self, sets: Sequence[str], fpr95: FprDefinition, knn_k: int, temperature: float
    ) -> None:
        self.sets = sets
        self.fpr95 = fpr95
        self.knn_k = knn_k
        self.temperature = temperature

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs classes, and that the dataset is not its own OOD set."""
        if dataset.name in self.sets:
            return "another dataset than the OOD one"
        return has_labels(dataset)

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return AUROC, AUPR and FPR95 of each score on each set."""
        similarity = subject.similarity

        def embedded(of: Subject, split: str = "test") -> Tensor:
            return similarity.embed_image(of.split(split).raw_nD.double())

        head = SimilarityHead(subject.class_vectors.double(), similarity, subject.scale)
        functions = zero_shot_scores(head, self.temperature)
        if "train" in subject.dataset.splits:
            train_ND = embedded(subject, "train")
            label_N = subject.split("train").label_n
            functions |= fitted_scores(head, train_ND, label_N, self.knn_k)
        id_nD = embedded(subject)
        with torch.no_grad():
            id_scores = {name: f(id_nD).numpy() for name, f in functions.items()}
        for other in self.sets:
            ood_mD = embedded(subject.partner(other))
            found: list[AnyMetric] = []
            curves: dict[str, list[tuple[float, float]]] = {}
            with torch.no_grad():
                for name, function in functions.items():
                    ood_m = function(ood_mD).numpy()
                    standings = metrics.Standings(id_scores[name], ood_m)
                    found += self._metrics(name, other, standings)
                    curves[name] = _roc(standings)
            yield Outcome(found, f"{self.name}/{other}", shown={"roc": curves})

    def _metrics(self, name: str, other: str, standings: metrics.Standings) -> list[AnyMetric]:
        said = f"ID against {other}; ID is positive, higher is more ID"
        rows: list[tuple[str, str, float | None, Callable[[metrics.Counts], FloatArray]]] = [
            ("auroc", "P(ID above OOD), ties half", 0.5, metrics.auroc),
            ("aupr", "area under precision over recall, trapezoids", None, metrics.aupr_trapezoid),
            (
                "fpr95",
                f"OOD taken for ID at recall 0.95 (fpr95={self.fpr95})",
                None,
                metrics.FPR95[self.fpr95],
            ),
        ]
        return [
            Statistic(
                f"{name}_{what}",
                f"{text}; {said}",
                chance,
                len(standings.set_n),
                partial(_measured, measure, standings),
                strata_n=standings.set_n,
            )
            for what, text, chance, measure in rows
        ]


def _measured(
    measure: Callable[[metrics.Counts], FloatArray],
    standings: metrics.Standings,
    count_bn: FloatArray,
) -> FloatArray:
    return measure(standings.counted(count_bn))


def _roc(standings: metrics.Standings) -> list[tuple[float, float]]:
    """Return points (false positive rate, recall) of the ROC, at most NUM_CURVE_POINTS."""
    once = standings.once()
    rate_t, recall_t = once.false_rate_bt[0], once.recall_bt[0]
    at = np.unique(np.linspace(0, len(rate_t) - 1, NUM_CURVE_POINTS).astype(np.int64))
    return [(float(rate_t[i]), float(recall_t[i])) for i in at]
