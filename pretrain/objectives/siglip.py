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
_EXACT = 40.0  # from there on log(1 + exp(z)) is z, to the last bit of float64


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

    from pretrain.objectives.rows import mean_over_logits

    image_bD = similarity.embed_image(features.image_bD)
    text_bD = similarity.embed_text(features.text_bD)
    b = len(image_bD)

    def summed(start: int, logits_cm: Tensor, *, own: int) -> Tensor:
        """`own` is the place of the first own pair among the texts; below zero: none is there."""
        place_c1 = own + start + torch.arange(len(logits_cm), device=logits_cm.device)[:, None]

        def turn_own() -> None:
            if own >= 0:
                logits_cm.scatter_(1, place_c1, -logits_cm.gather(1, place_c1))

        turn_own()  # -y z, of which the loss is log(1 + exp(-y z)), and -y its slope by z
        loss = torch.nn.functional.softplus(logits_cm, threshold=_EXACT).sum()
        logits_cm.sigmoid_()
        turn_own()
        return loss

    def against(text_mD: Tensor, own: int) -> Tensor:
        return mean_over_logits(
            partial(summed, own=own),
            image_bD,
            text_mD,
            features.logit_scale,
            features.logit_bias,
            scores=similarity.scores,
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
