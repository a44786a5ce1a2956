"""Goldens of zero-shot, retrieval, selection, CLIPScore, WiSE-FT and the geometry of features."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from torch import Tensor

from evaluation.methods import clipscore as clipscore_method
from evaluation.methods import geometry
from evaluation.methods import retrieval as retrieval_method
from evaluation.methods import selection as selection_method
from evaluation.methods import wise_ft as wise_ft_method
from evaluation.methods import zero_shot as zero_shot_method
from evaluation.ranking import FeatureScores
from pretrain.model.geometries import Cosine, Elliptic, Euclidean
from tools.conformance.evaluation.golden import EXACT, SCALE, SCORE_RTOL, Golden
from tools.conformance.table import Row, compare, not_comparable


def zero_shot(golden: Golden) -> Iterator[Row]:
    """Classifier, logits, accuracies and average precision."""
    cosine = Cosine()
    token_pD, image_nD = golden.tensor("token_embeddings"), golden.tensor("images")
    num_templates = int(golden.number("n_templates"))
    class_CD = cosine.class_vectors(token_pD.reshape(-1, num_templates, token_pD.shape[1]))
    image_nD = cosine.embed(image_nD)
    for key in ("classifier", "open_clip_classifier"):
        if key in golden:
            yield compare(golden.name, key, class_CD.T, golden[key], atol=1e-6, rtol=SCORE_RTOL)
    logit_nC = SCALE * cosine.scores(image_nD, class_CD)
    yield compare(golden.name, "logits", logit_nC, golden["logits"], atol=1e-4, rtol=SCORE_RTOL)
    scores = FeatureScores(image_nD, class_CD, cosine)
    metrics = zero_shot_method.accuracies(scores, golden["labels"].astype(np.int64), len(class_CD))
    named = {"top1": "acc1", "top5": "acc5", "mean_per_class_recall": "mean_per_class_recall"}
    for metric in metrics:
        if named[metric.name] in golden:
            expected = golden[named[metric.name]]
            yield compare(golden.name, named[metric.name], metric.value, expected, atol=EXACT)
    if "multilabel_targets" in golden:
        ap_C = zero_shot_method.average_precisions(
            logit_nC.numpy(), golden["multilabel_targets"].astype(bool)
        )
        yield compare(golden.name, "ap_per_class", ap_C, golden["ap_per_class"], atol=EXACT)
        yield compare(golden.name, "mAP", np.mean(ap_C), golden["mAP"], atol=EXACT)


def retrieval(golden: Golden) -> Iterator[Row]:
    """R@K of both directions."""
    cosine = Cosine()
    scores = FeatureScores(
        cosine.embed(golden.tensor("image_emb")),
        cosine.embed(golden.tensor("text_emb")),
        cosine,
    )
    image_of_text = golden["text_image_index"].astype(np.int64)
    for key in sorted(golden.arrays):
        direction, _, rank = key.partition("_retrieval_recall@")
        if not rank:
            continue
        cutoff = int(rank)
        name = {"image": "t2i", "text": "i2t"}[direction]
        found = {
            metric.name: metric.value
            for metric in retrieval_method.recalls(scores, image_of_text, (cutoff,))
        }
        yield compare(golden.name, key, found[f"{name}_recall@{cutoff}"], golden[key], atol=EXACT)


def selection(golden: Golden) -> Iterator[Row]:
    """Text, image and joint accuracy of instances."""
    cosine = Cosine()
    image_kaD = cosine.embed(golden.tensor("image_emb"))
    text_kbD = cosine.embed(golden.tensor("text_emb"))
    found = selection_method.credits(selection_method.instance_scores(image_kaD, text_kbD, cosine))
    for key, credit_k in zip(("text_acc", "image_acc", "acc"), found, strict=True):
        if key in golden:
            yield compare(golden.name, key, float(credit_k.mean()), golden[key], atol=EXACT)


def clipscore(golden: Golden) -> Iterator[Row]:
    """CLIPScore, RefCLIPScore and their reference-only part."""
    cosine = Cosine()
    image_nD, candidate_nD, reference_mD = (
        cosine.embed(golden.tensor(f"{what}_features"))
        for what in ("image", "candidate", "reference")
    )
    weight = golden.number("w", clipscore_method.WEIGHT)
    score_n = clipscore_method.clip_scores(image_nD, candidate_nD, cosine, weight)
    counts = [int(count) for count in golden["reference_counts"]]
    ref_n = clipscore_method.reference_scores(candidate_nD, reference_mD, counts, cosine)
    both_n = clipscore_method.ref_clip_scores(score_n, ref_n)
    for key, ours in (("clipscore", score_n), ("ref_only", ref_n), ("refclipscore", both_n)):
        yield compare(golden.name, key, ours, golden[key], atol=1e-6, rtol=SCORE_RTOL)
        mean = golden[f"{key}_mean"]
        yield compare(
            golden.name, f"{key}_mean", float(ours.mean()), mean, atol=1e-6, rtol=SCORE_RTOL
        )


def align_uniform(golden: Golden) -> Iterator[Row]:
    """Alignment, uniformity and the modality gap."""
    cosine = Cosine()
    x_nD, y_nD = golden.tensor("x"), golden.tensor("y")
    ours: dict[str, Tensor | float] = {
        "align": geometry.squared_lengths(x_nD, y_nD).mean(),
        "uniform_x": geometry.uniformity(x_nD),
        "uniform_y": geometry.uniformity(y_nD),
        "modality_gap": geometry.gap(cosine.embed(x_nD), cosine.embed(y_nD)),
        "modality_gap_vec": geometry.gap_vector(cosine.embed(x_nD), cosine.embed(y_nD)),
    }
    for key, value in ours.items():
        if key in golden:
            yield compare(golden.name, key, value, golden[key], atol=1e-6, rtol=SCORE_RTOL)


def wise_ft(golden: Golden) -> Iterator[Row]:
    """Both interpolations at every alpha in the file."""

    def weights(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}_"
        return {
            key.removeprefix(start): golden.tensor(key)
            for key in golden.arrays
            if key.startswith(start)
        }

    t0, t1, f0, f1 = (weights(prefix) for prefix in ("t0", "t1", "f0", "f1"))
    alphas = sorted(
        {key.split("_")[1] for key in golden.arrays if key.startswith(("plain_a", "fisher_a"))}
    )
    for text in alphas:
        alpha = float(text.removeprefix("a"))
        cases: dict[str, Callable[[], dict[str, Tensor]]] = {
            "plain": partial(wise_ft_method.interpolate, t0, t1, alpha),
            "fisher": partial(wise_ft_method.interpolate_fisher, t0, t1, f0, f1, alpha),
        }
        for kind, interpolate in cases.items():
            for name, ours in interpolate().items():
                key = f"{kind}_{text}_{name}"
                if key in golden:
                    yield compare(golden.name, key, ours, golden[key], atol=1e-6, rtol=SCORE_RTOL)


def euclip_geometry(golden: Golden) -> Iterator[Row]:
    """Scores and cones of the similarity objects; x are texts, y images.

    What is on the hyperboloid is not compared: neither the file nor its README says by which factor
    x and y were taken as tangent vectors. objectives/euclip.npz, whose factor is given, holds the
    same distances and cones and is compared (tools.conformance objectives).
    """
    x_nD, y_nD = golden.tensor("x").double(), golden.tensor("y").double()
    cosine = Cosine()
    unit = cosine.embed(x_nD), cosine.embed(y_nD)
    ours: dict[str, Tensor] = {
        "cosine": cosine.scores(*unit),
        "elliptic": Elliptic().scores(*unit),
        "euclidean": Euclidean("distance").scores(x_nD, y_nD),
        "euclidean_squared": Euclidean("squared").scores(x_nD, y_nD),
    }
    for key in golden.arrays:
        if re.fullmatch(r"(lorentzian|hyperbolic)_.*", key):
            yield not_comparable(golden.name, f"{key}: the factor of the tangents is not stated")
        found = re.fullmatch(r"euclidean_entailment_K([\d.]+)", key)
        if found:
            plane = Euclidean("distance")
            beyond = plane.exterior_angle(x_nD, y_nD) - plane.half_aperture(x_nD, float(found[1]))
            # With K = 0 the file holds the mean over pairs
            ours[key] = beyond.clamp(min=0) if golden[key].ndim else beyond.mean()
    for key, value in ours.items():
        if key in golden:
            yield compare(golden.name, key, value, golden[key], atol=1e-5, rtol=SCORE_RTOL)
