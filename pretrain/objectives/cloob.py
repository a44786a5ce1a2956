"""CLOOB: modern Hopfield retrieval, then InfoLOOB (arXiv:2110.11316, equations 4 to 7).

R(Q; S) = rownorm(softmax(beta Q S^T) S) retrieves the rows of Q from the store S, which is the
global batch: I from I and T from I (p_xx, p_xy), T from T and I from T (p_yy, p_yx). No parameters.
L = LOOB(p_xx, p_xy) + LOOB(p_yy, p_yx), the inverse temperature being the model's logit scale, held
fixed. Evaluation compares the features themselves, without retrieval.

Each rank retrieves its own rows from the whole store and gathers what the others retrieved, so that
no work is done twice and the gradients are exact.

Legend: b local pairs, B of the global batch, D embedding width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from pretrain.model.features import Features
from pretrain.model.logits import Logits
from pretrain.objectives.infoloob import loob
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group


def retrieve(state_bD: Tensor, stored_BD: Tensor, beta: float) -> Tensor:
    """Return one update of a Hopfield network with the patterns `stored`, rows of length 1."""
    from torch.nn.functional import normalize, scaled_dot_product_attention

    state, stored = state_bD[None, None], stored_BD[None, None]  # one sequence, one head
    retrieved = scaled_dot_product_attention(state, stored, stored, scale=beta)
    return normalize(retrieved[0, 0], dim=-1)


def cloob_loss(
    features: Features,
    *,
    similarity: Similarity,
    group: Group,
    beta: float = 8.0,
    chunk_rows: int = 512,
) -> Tensor:
    """Return CLOOB's loss; beta is the released `scale_hopfield`."""
    from pretrain.objectives.rows import dot

    x_bD = similarity.embed_image(features.image_bD)
    y_bD = similarity.embed_text(features.text_bD)
    compare = partial(
        loob, scale=features.logit_scale, scores=dot, group=group, chunk_rows=chunk_rows
    )
    x_BD, y_BD = group.gather(x_bD), group.gather(y_bD)
    p_xx, p_xy = retrieve(x_bD, x_BD, beta), retrieve(y_bD, x_BD, beta)
    p_yy, p_yx = retrieve(y_bD, y_BD, beta), retrieve(x_bD, y_BD, beta)
    return compare(p_xx, group.gather(p_xy)) + compare(p_yy, group.gather(p_yx))


@objectives.register("cloob")
def cloob(*, beta: PositiveFloat = 8.0, chunk_rows: PositiveInt = 512) -> Objective:
    """CLOOB (arXiv:2110.11316): beta 8 and a fixed inverse temperature of 30, as for CC3M."""
    return Objective(
        partial(cloob_loss, beta=beta, chunk_rows=chunk_rows),
        geometries=("cosine",),
        logits=Logits(30.0, learnable=False),
    )
