"""What the log shows beside the loss: how often the own pair is the nearest of the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.model.features import Features
from pretrain.model.similarity import Similarity
from pretrain.objectives.group import Group
from pretrain.objectives.rows import mean_over_rows, own_places

_CHUNK_ROWS = 512


@torch.no_grad()
def batch_accuracy(
    features: Features, *, similarity: Similarity, group: Group
) -> tuple[Tensor, Tensor]:
    """Return the shares of own images and of own texts whose partner is nearest."""
    image_bD = similarity.embed_image(features.image_bD)
    text_bD = similarity.embed_text(features.text_bD)

    def image_hits(start: int, image_cD: Tensor, text_BD: Tensor) -> Tensor:
        own = own_places(group, len(image_bD), start, image_cD)
        return (similarity.scores(image_cD, text_BD).argmax(dim=1) == own).sum().to(text_BD.dtype)

    def text_hits(start: int, text_cD: Tensor, image_BD: Tensor) -> Tensor:
        own = own_places(group, len(text_bD), start, text_cD)
        return (similarity.scores(image_BD, text_cD).argmax(dim=0) == own).sum().to(text_cD.dtype)

    i2t = mean_over_rows(image_hits, [image_bD], [group.gather(text_bD)], chunk_rows=_CHUNK_ROWS)
    t2i = mean_over_rows(text_hits, [text_bD], [group.gather(image_bD)], chunk_rows=_CHUNK_ROWS)
    return i2t, t2i
