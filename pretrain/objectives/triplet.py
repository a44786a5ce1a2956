"""Hard negatives: NegCLIP (arXiv:2210.01936) and TripletCLIP (arXiv:2411.02545).

NegCLIP(I, T, N) = [CE(s m(I, [T | N])) + CE(s m(T, I))] / 2: each image is also compared with the
hard negative texts of the global batch. TripletCLIP adds the negatives' own images:
L = NegCLIP(I, T, N) + NegCLIP(I', N, T), I' the image of the negative text.

Legend: b local pairs, B of the global batch, D embedding width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from pretrain.model.features import Features, required
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group


def _negclip(
    image_bD: Tensor,
    text_bD: Tensor,
    negative_bD: Tensor,
    scale: Tensor,
    similarity: Similarity,
    group: Group,
    chunk_rows: int,
) -> Tensor:
    """NegCLIP of embedded features."""
    import torch

    from pretrain.objectives.rows import softmax_loss

    compare = partial(
        softmax_loss,
        scale=scale,
        group=group,
        chunk_rows=chunk_rows,
        parameters=tuple(similarity.parameters()),
    )
    candidate_mD = torch.cat([group.gather(text_bD), group.gather(negative_bD)])
    i2t = compare(image_bD, candidate_mD, scores=similarity.scores)
    t2i = compare(
        text_bD, group.gather(image_bD), scores=lambda text, image: similarity.scores(image, text).T
    )
    return (i2t + t2i) / 2


def negclip_loss(
    features: Features, *, similarity: Similarity, group: Group, chunk_rows: int = 512
) -> Tensor:
    """Return NegCLIP's loss."""
    (negative_text_bD,) = required(features.negative_text_bD)
    return _negclip(
        similarity.embed_image(features.image_bD),
        similarity.embed_text(features.text_bD),
        similarity.embed_text(negative_text_bD),
        features.logit_scale,
        similarity,
        group,
        chunk_rows,
    )


def triplet_loss(
    features: Features, *, similarity: Similarity, group: Group, chunk_rows: int = 512
) -> Tensor:
    """Return TripletCLIP's loss."""
    negatives = required(features.negative_image_bD, features.negative_text_bD)
    image_bD = similarity.embed_image(features.image_bD)
    text_bD = similarity.embed_text(features.text_bD)
    negative_image_bD = similarity.embed_image(negatives[0])
    negative_text_bD = similarity.embed_text(negatives[1])
    common = (features.logit_scale, similarity, group, chunk_rows)
    return _negclip(image_bD, text_bD, negative_text_bD, *common) + _negclip(
        negative_image_bD, negative_text_bD, text_bD, *common
    )


@objectives.register("negclip")
def negclip(*, chunk_rows: PositiveInt = 512) -> Objective:
    """InfoNCE with hard negative texts (NegCLIP, arXiv:2210.01936)."""
    return Objective(
        partial(negclip_loss, chunk_rows=chunk_rows), needs=frozenset({"negative_text"})
    )


@objectives.register("triplet")
def triplet(*, chunk_rows: PositiveInt = 512) -> Objective:
    """InfoNCE with hard negative texts and their images (TripletCLIP, arXiv:2411.02545)."""
    return Objective(
        partial(triplet_loss, chunk_rows=chunk_rows),
        needs=frozenset({"negative_text", "negative_image"}),
    )
