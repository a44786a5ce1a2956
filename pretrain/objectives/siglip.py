"""Sigmoid loss for image-text pairs (SigLIP, arXiv:2303.15343, algorithm 1).

L = 1/b sum_i sum_j log(1 + exp(-y_ij (s m(I_i, T_j) + bias))), y = 1 on the diagonal, -1 off it;
divided by the number of images, not of pairs. A sum over pairs needs no common denominator, so the
texts of other ranks can come one block at a time: `exchange: ring` holds one rank's, `gather` all.

Legend: b local pairs, c of a chunk, D embedding width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from pretrain.model.features import Features
from pretrain.model.logits import Logits
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group

Exchange = Literal["ring", "gather"]


def siglip_loss(
    features: Features,
    *,
    similarity: Similarity,
    group: Group,
    exchange: Exchange = "ring",
    chunk_rows: int = 512,
) -> Tensor:
    """Return the sigmoid loss of the own images against every text."""
    import torch

    from pretrain.objectives.rows import mean_over_rows

    image_bD = similarity.embed_image(features.image_bD)
    text_bD = similarity.embed_text(features.text_bD)
    b = len(image_bD)
    scale = features.logit_scale.to(image_bD.dtype)
    bias = torch.zeros_like(scale) if features.logit_bias is None else features.logit_bias.to(scale)

    def summed(
        start: int, image_cD: Tensor, text_mD: Tensor, scale: Tensor, bias: Tensor, *, own: int
    ) -> Tensor:
        """`own` is the place of the first own pair among the texts; below zero: none is there."""
        logits_cm = scale * similarity.scores(image_cD, text_mD) + bias
        sign_cm = torch.ones_like(logits_cm)
        if own >= 0:
            row = torch.arange(len(image_cD), device=image_cD.device)
            sign_cm[row, own + start + row] = -1
        return -torch.nn.functional.logsigmoid(-sign_cm * logits_cm).sum()

    def against(text_mD: Tensor, own: int) -> Tensor:
        return mean_over_rows(
            partial(summed, own=own),
            [image_bD],
            [text_mD, scale, bias],
            chunk_rows=chunk_rows,
            parameters=tuple(similarity.parameters()),
        )

    if exchange == "gather":
        return against(group.gather(text_bD), own=group.rank * b)
    blocks = [against(block, 0 if r == group.rank else -1) for r, block in group.ring(text_bD)]
    return torch.stack(blocks).sum()


@objectives.register("siglip")
def siglip(*, exchange: Exchange = "ring", chunk_rows: PositiveInt = 512) -> Objective:
    """Sigmoid loss (SigLIP, arXiv:2303.15343); s starts at 10, the bias at -10."""
    return Objective(
        partial(siglip_loss, exchange=exchange, chunk_rows=chunk_rows), logits=Logits(10.0, -10.0)
    )
