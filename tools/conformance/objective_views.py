"""SLIP and A-CLIP, whose objectives compare views, against numbers from the authors' own code."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretrain.model.attentive import kept_patches
from pretrain.model.features import Features
from pretrain.reduction.image import AttentivePatches
from tools.conformance.objectives import CLIP_SCALE, Golden, geometry, loss_of, scalar, slopes
from tools.conformance.table import Row


def check_slip(golden: Golden) -> Iterator[Row]:
    """SLIP: CLIP plus SimCLR between the views."""
    cosine = geometry("cosine")
    for case, _ in golden.cases(r"s\d+_b\d+_d\d+"):
        image, text = golden.pair(case)
        views = golden.leaf(f"{case}/aug1_raw"), golden.leaf(f"{case}/aug2_raw")
        features = Features(image, text, scalar(CLIP_SCALE), view_a_bP=views[0], view_b_bP=views[1])
        clip, ssl = loss_of("clip", features, cosine), loss_of("simclr", features, cosine)
        inputs = {
            "img_raw": image,
            "txt_raw": text,
            "aug1_raw": views[0],
            "aug2_raw": views[1],
        }
        found = {"clip": clip, "ssl": ssl, "loss": clip + ssl}
        yield from golden.rows(case, {**found, **slopes(clip + ssl, **inputs)})


def check_aclip(golden: Golden) -> Iterator[Row]:
    """A-CLIP: both views against the text, BYOL, SimCLR as the paper has it; and the mask rule.

    The released sum compares a view with itself in SimCLR: the sum here is made with that slip, and
    the gradient that it enters is left out.
    """
    cosine = geometry("cosine")
    for case, _ in golden.cases(r"s\d+_b\d+_d\d+"):
        _, text = golden.pair(case)
        image, ssl, byol = (
            golden.leaf(f"{case}/{name}") for name in ("image_embed", "ssl", "byol")
        )
        (first, second), (a, b), online = image.chunk(2), ssl.chunk(2), byol.chunk(2)
        features = Features(
            first,
            text,
            scalar(CLIP_SCALE),
            view_a_bP=a,
            view_b_bP=b,
            second_image_bD=second,
            online_a_bP=online[0],
            online_b_bP=online[1],
            mean_target_bP=golden.leaf(f"{case}/byol_ema"),
        )
        parts = [loss_of(name, features, cosine) for name in ("clip_views", "byol")]
        slip = loss_of("simclr", features._replace(view_b_bP=a), cosine)
        loss = parts[0] + slip + 2 * parts[1]
        found = {
            "contra1": loss_of("clip", features, cosine),
            "contra2": loss_of("clip", features._replace(image_bD=second), cosine),
            "byol_loss": parts[1],
            "simclr_FIXED": loss_of("simclr", features, cosine),
            "simclr_AS_RELEASED": slip,
            "loss": loss,
        }
        yield from golden.rows(case, {**found, **slopes(loss, img=image, txt=text, byol=byol)})
    for case, _ in golden.cases(r"s\d+/mask"):
        score = torch.tensor(golden.arrays[f"{case}/attention"])
        side = round(score.shape[1] ** 0.5)
        kept = kept_patches(score, side, 2, AttentivePatches(0.5, 2, 1.0).num_blocks(side))
        removed = torch.ones_like(score).scatter(1, kept, 0.0)
        yield from golden.rows(case, {"mask_true_is_removed": removed})
