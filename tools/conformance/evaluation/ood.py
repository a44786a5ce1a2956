"""Goldens of out-of-distribution detection: scores, thresholds, areas."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from torch import Tensor

from evaluation.methods import ood_metrics as metrics
from evaluation.methods import ood_scores as scores
from pretrain.model.geometries import Cosine
from tools.conformance.evaluation.golden import EXACT, LOOSE_RTOL, SCORE_RTOL, Golden
from tools.conformance.table import Row, compare

Score = Callable[[Tensor], Tensor]
Measure = Callable[[metrics.Counts], metrics.FloatArray]
_AREAS: Mapping[str, Measure] = {
    "auroc": metrics.auroc,
    "aupr_in": metrics.aupr_trapezoid,
    "fpr95": metrics.fpr95_vim,
}


def fpr95_variants(golden: Golden) -> Iterator[Row]:
    """The four definitions of FPR95, AUROC and both areas under precision and recall."""
    measures: dict[str, Measure] = {
        **{f"fpr95_{name}": function for name, function in metrics.FPR95.items()},
        "auroc": metrics.auroc,
        "auroc_knn_ood": metrics.auroc,
        "aupr_in_vim": metrics.aupr_trapezoid,
        "aupr_mcm": metrics.average_precision,
    }
    for case in sorted({key.removesuffix("_id") for key in golden.arrays if key.endswith("_id")}):
        id_n, ood_m = (golden[f"{case}_{which}"].astype(np.float64) for which in ("id", "ood"))
        once = metrics.Standings(id_n, ood_m).once()
        for name, measure in measures.items():
            key = f"{case}_{name}"
            if key in golden:
                yield compare(golden.name, key, measure(once)[0], golden[key], atol=EXACT)


def vim(golden: Golden) -> Iterator[Row]:
    """Every score of ViM's benchmark, its statistics, and the metrics of each score."""
    train_ND, label_N = golden.tensor("train").double(), golden.tensor("train_y").long()
    head = scores.Head(golden.tensor("w").double(), golden.tensor("b").double())
    dimension = int(golden.number("vim_DIM")) if "vim_DIM" in golden else None
    fitted = scores.fit_vim(train_ND, head, dimension)
    gaussians = scores.fit_gaussians(train_ND, label_N)
    ceiling = scores.react_clip(train_ND)
    profile_KC = scores.class_profiles(head.logits(train_ND))
    own = scores.principal_dimension(train_ND.shape[1])
    residual_DR = fitted.residual_DR
    statistics: dict[str, tuple[Tensor | float, float]] = {
        "vim_DIM": (own, SCORE_RTOL),
        "vim_u": (fitted.origin_D, LOOSE_RTOL),
        "vim_alpha": (fitted.alpha, SCORE_RTOL),
        "vim_NS_projector": (residual_DR @ residual_DR.T, LOOSE_RTOL),
        "react_clip": (ceiling, SCORE_RTOL),
        "maha_mean": (gaussians.mean_CD, SCORE_RTOL),
        "maha_prec": (gaussians.precision_DD, LOOSE_RTOL),
    }
    for key, (ours, rtol) in statistics.items():
        if key in golden:
            span = 1e-5 * float(np.max(np.abs(golden[key])))
            yield compare(golden.name, key, ours, golden[key], atol=span, rtol=rtol)
    functions: dict[str, Score] = {
        "MSP": lambda f: scores.msp(head.logits(f)),
        "MaxLogit": lambda f: scores.max_logit(head.logits(f)),
        "Energy": lambda f: scores.energy(head.logits(f)),
        "Energy_React": lambda f: scores.react(f, head, ceiling),
        "ViM": lambda f: fitted.score(f, head.logits(f)),
        "Residual": lambda f: -fitted.residual(f),
        "GradNorm": lambda f: scores.grad_norm(f, head.logits(f)),
        "Mahalanobis": gaussians.score,
        "KL_Matching": lambda f: scores.kl_matching(head.logits(f), profile_KC),
    }
    for key in golden.arrays:
        found = re.fullmatch(r"KNN(\d+)__id", key)
        if found:
            k = int(found[1])
            functions[f"KNN{k}"] = lambda f, k=k: scores.knn(f, train_ND, k)  # type: ignore[misc]
    for name, function in functions.items():
        if f"{name}__id" in golden:
            rtol = LOOSE_RTOL if name == "Mahalanobis" else SCORE_RTOL
            yield from _score_rows(golden, name, function, rtol)


def _score_rows(golden: Golden, name: str, score: Score, rtol: float) -> Iterator[Row]:
    sets = [key.split("__")[1] for key in golden.arrays if re.fullmatch(f"{name}__[a-z]+", key)]
    ours = {s: score(golden.tensor("val" if s == "id" else s).double()).numpy() for s in sets}
    for which, values in ours.items():
        expected = golden[f"{name}__{which}"]
        yield compare(golden.name, f"{name}__{which}", values, expected, atol=1e-5, rtol=rtol)
    for which in sets:
        once = metrics.Standings(ours["id"], ours[which]).once()
        for what, measure in _AREAS.items():
            key = f"{name}__{which}__{what}"
            if key in golden:
                yield compare(golden.name, key, measure(once)[0], golden[key], atol=EXACT)
        key = f"{name}__{which}__aupr_out"
        if key in golden:
            reverse = metrics.Standings(-ours[which], -ours["id"]).once()
            yield compare(
                golden.name, key, metrics.aupr_trapezoid(reverse)[0], golden[key], atol=EXACT
            )


def mcm(golden: Golden) -> Iterator[Row]:
    """MCM and its relatives at every temperature; the repository's scores are lower for ID."""
    cosine = Cosine()
    # In float32, as published: the metrics below rank scores of which some tie there. The suite
    # itself takes float64.
    text_CD = cosine.embed(golden.tensor("text"))
    similarity = {
        which: cosine.scores(cosine.embed(golden.tensor(f"{which}_x")), text_CD)
        for which in ("id", "ood")
    }
    functions: dict[str, Callable[[Tensor, float], Tensor]] = {
        "MCM": scores.mcm,
        "max_logit": lambda s, t: scores.max_logit(s),
        "energy": scores.energy,
        "entropy": scores.negative_entropy,
        "var": scores.variance,
    }
    cases = sorted({key.split("__")[0] for key in golden.arrays if "_T" in key})
    for case in cases:
        name, temperature = case.rsplit("_T", 1)
        ours = {
            which: functions[name](s, float(temperature)).numpy() for which, s in similarity.items()
        }
        for which, values in ours.items():
            expected = golden[f"{case}__{which}"]
            yield compare(
                golden.name, f"{case}__{which}", -values, expected, atol=1e-6, rtol=SCORE_RTOL
            )
        id_n, ood_m = (ours[which].astype(np.float64) for which in ("id", "ood"))
        once = metrics.Standings(id_n, ood_m).once()
        found = {
            "auroc": metrics.auroc(once)[0],
            "aupr": metrics.average_precision(once)[0],
            "fpr95": metrics.fpr95_mcm(once)[0],
        }
        atol = EXACT + _undecided(id_n, ood_m)
        for what, value in found.items():
            yield compare(
                golden.name, f"{case}__{what}", value, golden[f"{case}__{what}"], atol=atol
            )


def _undecided(id_n: metrics.FloatArray, ood_m: metrics.FloatArray) -> float:
    """Return the share of pairs of an ID and an OOD score that float32 cannot tell apart.

    Their order, which AUROC and AUPR count, is that of the last bit, and another processor's.
    """
    gap_nm = np.abs(id_n[:, None] - ood_m)
    last_bit = np.spacing(np.float32(max(np.abs(id_n).max(), np.abs(ood_m).max())))
    return float((gap_nm <= last_bit).mean())
