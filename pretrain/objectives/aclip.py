"""A-CLIP's losses (Yang et al., arXiv:2212.08653), beside `reduction: {name: attentive}`:

    clip_views   [C(view 1, text) + C(view 2, text)] / 2, C = InfoNCE (clip.py)
    byol         mean over both views of 2 - 2 cos(prediction of the view, the mean teacher's
                 projection of the crop around both) (Grill et al., arXiv:2006.07733)

The paper's sum is clip_views + simclr + 2 byol. The released code has three slips that are not
repeated: its SimCLR compares a view with itself, its crop around the views takes the wrong corner
(and may leave out a part of the second), and a transform's name is misspelt.

Legend: b local pairs, D embedding width, P width of a projection.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from pretrain.model.features import Features, required
from pretrain.objectives.clip import clip_loss
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group


def clip_views_loss(
    features: Features, *, similarity: Similarity, group: Group, chunk_rows: int = 512
) -> Tensor:
    """Return the mean over the two views of InfoNCE with the text."""
    (second_bD,) = required(features.second_image_bD)
    first, second = (
        clip_loss(f, similarity=similarity, group=group, chunk_rows=chunk_rows)
        for f in (features, features._replace(image_bD=second_bD))
    )
    return (first + second) / 2


def byol_loss(features: Features, *, similarity: Similarity, group: Group) -> Tensor:
    """Return BYOL's loss of own rows; the geometry of the model has no part in it."""
    from pretrain.objectives.rows import unit

    a_bP, b_bP, target_bP = map(
        unit, required(features.online_a_bP, features.online_b_bP, features.mean_target_bP)
    )
    cosines_b = ((a_bP + b_bP) * target_bP).sum(dim=-1) / 2
    return (2 - 2 * cosines_b).mean()


@objectives.register("clip_views")
def clip_views(*, chunk_rows: PositiveInt = 512) -> Objective:
    """InfoNCE of both attentively masked views (A-CLIP, arXiv:2212.08653)."""
    return Objective(
        partial(clip_views_loss, chunk_rows=chunk_rows), needs=frozenset({"second_image"})
    )


@objectives.register("byol")
def byol() -> Objective:
    """BYOL between the views and the mean teacher (A-CLIP, arXiv:2212.08653; arXiv:2006.07733)."""
    return Objective(byol_loss, needs=frozenset({"mean_target"}))
