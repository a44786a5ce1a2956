"""InfoLOOB, "leave one out bound": InfoNCE without the positive in the denominator
(arXiv:2110.11316, equation 5). CLOOB without its Hopfield retrieval.

LOOB(A, C) = 1/(b lam) sum_i [-lam m(a_i, c_i) + log sum_{j != i} exp(lam m(a_i, c_j))], and
L = LOOB(I, T) + LOOB(T, I), not halved. lam is the model's logit scale, held fixed: its gradient
-(1/lam^2) * (entropy of the negatives' softmax) never changes sign.

Legend: b local pairs, c of a chunk, B of the global batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from pretrain.model.features import Features
from pretrain.model.logits import Logits
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group


def loob(
    anchor_bD: Tensor,
    candidate_BD: Tensor,
    scale: Tensor,
    scores: Callable[[Tensor, Tensor], Tensor],
    group: Group,
    *,
    chunk_rows: int,
    parameters: Any = (),
) -> Tensor:
    """Return LOOB of the own rows against the global batch, which must hold two pairs at least."""
    from pretrain.objectives.rows import mean_over_rows, own_places

    assert len(candidate_BD) > 1, "InfoLOOB needs a negative: a global batch of 2 pairs at least"

    def summed(start: int, anchor_cD: Tensor, candidate_BD: Tensor, scale: Tensor) -> Tensor:
        logits_cB = scale * scores(anchor_cD, candidate_BD)
        own_c1 = own_places(group, len(anchor_bD), start, anchor_cD)[:, None]
        positive_c1 = logits_cB.gather(1, own_c1)
        negatives_c1 = logits_cB.scatter(1, own_c1, float("-inf")).logsumexp(dim=1, keepdim=True)
        return ((negatives_c1 - positive_c1) / scale).sum()

    return mean_over_rows(
        summed,
        [anchor_bD],
        [candidate_BD, scale.to(anchor_bD.dtype)],
        chunk_rows=chunk_rows,
        parameters=parameters,
    )


def infoloob_loss(
    features: Features, *, similarity: Similarity, group: Group, chunk_rows: int = 512
) -> Tensor:
    """Return InfoLOOB of images against texts and of texts against images."""
    image_bD = similarity.embed_image(features.image_bD)
    text_bD = similarity.embed_text(features.text_bD)
    compare = partial(
        loob,
        scale=features.logit_scale,
        group=group,
        chunk_rows=chunk_rows,
        parameters=tuple(similarity.parameters()),
    )
    return compare(image_bD, group.gather(text_bD), scores=similarity.scores) + compare(
        text_bD, group.gather(image_bD), scores=lambda text, image: similarity.scores(image, text).T
    )


@objectives.register("infoloob")
def infoloob(*, chunk_rows: PositiveInt = 512) -> Objective:
    """InfoLOOB alone (arXiv:2110.11316), with a fixed inverse temperature of 30."""
    return Objective(
        partial(infoloob_loss, chunk_rows=chunk_rows), logits=Logits(30.0, learnable=False)
    )
