"""InfoNCE over image-text pairs (CLIP, arXiv:2103.00020, figure 3; Oord et al., arXiv:1807.03748).

L = [CE(s m(I, T)) + CE(s m(T, I))] / 2, the labels on the diagonal, s = exp(logit scale), m the
model's similarity: the cosine in CLIP, minus a squared distance in EuCLIP (arXiv:2409.13079), minus
a Lorentz distance in MERU (arXiv:2304.09172).

Each rank compares its own rows with the global batch (local loss, gather with gradient): exact at
any number of ranks; see group.py. Chunks of rows keep the memory at O(chunk x B); see rows.py.

Legend: b local pairs, B = b * group.size pairs of the global batch, D embedding width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from pretrain.model.features import Features
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group


def clip_loss(
    features: Features,
    *,
    similarity: Similarity,
    group: Group,
    label_smoothing: float = 0.0,
    chunk_rows: int = 512,
) -> Tensor:
    """Return InfoNCE. `label_smoothing` spreads that share of each label over the global batch."""
    from pretrain.objectives.rows import softmax_loss

    image_bD = similarity.embed_image(features.image_bD)
    text_bD = similarity.embed_text(features.text_bD)
    compare = partial(
        softmax_loss,
        scale=features.logit_scale,
        group=group,
        chunk_rows=chunk_rows,
        parameters=tuple(similarity.parameters()),
        label_smoothing=label_smoothing,
    )
    i2t = compare(image_bD, group.gather(text_bD), scores=similarity.scores)
    t2i = compare(
        text_bD, group.gather(image_bD), scores=lambda text, image: similarity.scores(image, text).T
    )
    return (i2t + t2i) / 2


@objectives.register("clip")
def clip(
    *,
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    chunk_rows: PositiveInt = 512,
) -> Objective:
    """InfoNCE (CLIP, arXiv:2103.00020); label smoothing as in Long-CLIP (arXiv:2403.15378)."""
    return Objective(partial(clip_loss, label_smoothing=label_smoothing, chunk_rows=chunk_rows))
