"""EuCLIP's eight geometries and MERU against their authors' numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.model.features import Features
from tools.conformance.objectives import (
    ATOL,
    CLIP_SCALE,
    MERU_ENTAILMENT_ATOL,
    AsGiven,
    Golden,
    geometry,
    leaf,
    loss_of,
    scalar,
    slopes,
)
from tools.conformance.table import Row

_SCORES = {"": "distance", "-squared": "squared", "-inner": "inner"}


def _similarity(stem: str, kind: str, curvature: float | None) -> Any:
    """Return our similarity of a geometry of the fork: euclidean-squared, hyperbolic_c0.3, ..."""
    if stem in ("clip", "elliptic"):
        return geometry("cosine" if stem == "clip" else "elliptic")
    if stem == "euclidean":
        return geometry("euclidean", score=_SCORES[kind])
    return geometry("lorentz", score=_SCORES[kind], curvature=curvature)


def check_euclip(golden: Golden) -> Iterator[Row]:
    """EuCLIP: scores, contrastive and entailment loss, gradients of their sum."""
    pattern = (
        r"s\d+_b\d+_d(\d+)/(clip|elliptic|euclidean|hyperbolic)(-squared|-inner|)"
        r"(?:_c[\d.]+)?/ent([\d.]+)_K([\d.]+)"
    )
    for case, match in golden.cases(pattern):
        dim, stem, kind = int(match[1]), match[2], match[3]
        weight, radius = float(match[4]), float(match[5])
        has_curvature = golden.has(f"{case}/curv")
        curvature = float(golden.arrays[f"{case}/curv"]) if has_curvature else None
        similarity = _similarity(stem, kind, curvature)
        log_scale = scalar(float(torch.tensor(golden.arrays[f"{case}/scale"]).log()))
        image, text = golden.pair(case)

        def loss_and_parts(
            image: Any, text: Any, similarity: Any, log_scale: Any, weight: float, radius: float
        ) -> Any:
            features = Features(image, text, log_scale.exp())
            parts = {"contrastive": loss_of("clip", features, similarity)}
            if weight:
                cone = loss_of("entailment", features, similarity, min_radius=radius)
                parts["entailment_weighted"] = weight * cone
            return sum(parts.values()), parts

        loss, parts = loss_and_parts(image, text, similarity, log_scale, weight, radius)
        inputs = {"img_raw": image, "txt_raw": text, "log_scale": log_scale}
        if curvature is not None:
            inputs["curv"] = similarity.log_curvature
        found = {**parts, **slopes(loss, **inputs)}
        if curvature is not None:  # theirs is the gradient of c, ours of log c
            found["grad_curv"] = found["grad_curv"] / curvature
        if stem in ("clip", "elliptic"):  # their features are the normalized ones
            x, y = (leaf(similarity.embed(raw)) for raw in (image, text))
            loss, _ = loss_and_parts(x, y, AsGiven(similarity), log_scale, weight, radius)
            found |= slopes(loss, img_feat=x, txt_feat=y)
        else:  # theirs are d^-1/2 times the raw ones
            for side in ("img", "txt"):
                found[f"grad_{side}_feat"] = found[f"grad_{side}_raw"] * dim**0.5
        found["metric"] = similarity.scores(
            similarity.embed_image(image), similarity.embed_text(text)
        )
        yield from golden.rows(case, found)


def _log32(value: float) -> float:
    """Return a logarithm as MERU makes its parameters: in single precision."""
    return float(torch.tensor(value, dtype=torch.float32).log())


def check_meru(golden: Golden) -> Iterator[Row]:
    """MERU: points, distances, cones, losses (entailment weight 0.2, K 0.1), gradients."""
    for case, match in golden.cases(r"s\d+_b\d+_d\d+/c([\d.]+)"):
        similarity = _similarity("hyperbolic", "", float(match[1]))
        image, text = golden.pair(case)
        log_scale = scalar(_log32(CLIP_SCALE))
        # Ours is relative to D^-1/2, theirs holds the whole factor.
        width = image.shape[1]
        for alpha in (similarity.log_image_scale, similarity.log_text_scale):
            alpha.data.fill_(_log32(width**-0.5) + math.log(width) / 2)
        features = Features(image, text, log_scale.exp())
        contrastive = loss_of("clip", features, similarity)
        cones = loss_of("entailment", features, similarity, min_radius=0.1)
        loss = contrastive + 0.2 * cones
        x, y = similarity.embed_text(text), similarity.embed_image(image)
        exact = {
            "contrastive": contrastive,
            "hyper_img_space": y,
            "hyper_txt_space": x,
            "pairwise_dist": -similarity.scores(y, x),
            "log_map0_img": similarity.to_tangent(y),
        }
        clamped = {
            "loss": loss,
            "entailment": cones,
            "oxy_angle_txt_img": similarity.exterior_angle(x, y),
            "half_aperture_txt": similarity.half_aperture(x, 0.1),
            **slopes(
                loss,
                img_raw=image,
                txt_raw=text,
                log_scale=log_scale,
                log_curv=similarity.log_curvature,
                visual_alpha=similarity.log_image_scale,
                textual_alpha=similarity.log_text_scale,
            ),
        }
        yield from golden.rows(case, exact, atol=ATOL)
        yield from golden.rows(case, clamped, atol=MERU_ENTAILMENT_ATOL)
