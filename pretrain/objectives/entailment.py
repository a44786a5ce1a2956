"""A text entails its image: the image lies in the cone of its text (MERU, arXiv:2304.09172,
equations 5 to 7; Euclidean cones in arXiv:2409.13079). Paired rows only; goes beside a contrastive
objective, with a weight of 0.2 in the papers.

L = mean_i max(0, exterior angle(text_i, image_i) - half aperture(text_i)); the aperture depends on
the smallest radius K, which may go linearly to another value over the run.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat

from pretrain.model.features import Features
from pretrain.model.similarity import HAVE_CONES
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Cones
    from pretrain.objectives.group import Group


def entailment_loss(
    features: Features,
    *,
    similarity: Cones,
    group: Group,
    min_radius: float = 0.1,
    final_min_radius: float | None = None,
) -> Tensor:
    """Return how far, in radians, images lie outside the cones of their texts, on average."""
    radius = min_radius
    if final_min_radius is not None:
        radius += features.progress * (final_min_radius - min_radius)
    text_bD = similarity.embed_text(features.text_bD)
    angle_b = similarity.exterior_angle(text_bD, similarity.embed_image(features.image_bD))
    return (angle_b - similarity.half_aperture(text_bD, radius)).clamp_min(0).mean()


@objectives.register("entailment")
def entailment(
    *, min_radius: NonNegativeFloat = 0.1, final_min_radius: NonNegativeFloat | None = None
) -> Objective:
    """Entailment cones (MERU, arXiv:2304.09172); in Euclidean or Lorentz geometry."""
    loss = partial(entailment_loss, min_radius=min_radius, final_min_radius=final_min_radius)
    return Objective(loss, geometries=HAVE_CONES)
