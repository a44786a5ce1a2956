"""Weights from one shape of the model to another: what a stage takes over from the one before.

Only positions depend on the image size and the context length. Learned ones are resized by
open_clip's own rules: bicubic with antialiasing over the patch grid (the class token's stays),
linear over text positions. Sine-cosine positions are functions of the grid: those of the new grid
are kept, nothing is interpolated (FLIP's and CLIPA's reason for them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.model.clip import ClipModel, Json, resize_pos_embed, resize_text_pos_embed

IMAGE_POSITIONS = "visual.positional_embedding"
_FRESH = ("heads.",)  # what a stage's objective may bring along


@torch.no_grad()
def carry_weights(before: dict[str, Tensor], before_config: Json, model: ClipModel) -> None:
    """Load the weights `before` (by parameter name) into a model of the next stage.

    What the new objective brings (a head, a logit bias) keeps its fresh start; what only the old
    one had is left out.
    """
    clip = {n.removeprefix("clip."): w for n, w in before.items() if n.startswith("clip.")}
    if image_positions(model.config) == image_positions(before_config) == "sin_cos_2d":
        clip.pop(IMAGE_POSITIONS)
    resize_pos_embed(clip, model.clip)
    resize_text_pos_embed(clip, model.clip)
    resized = {f"clip.{name}": weight for name, weight in clip.items()}
    for name, parameter in model.named_parameters():
        weight = resized.get(name, before.get(name))
        if weight is None or name.removeprefix("clip.") == IMAGE_POSITIONS not in clip:
            continue
        if name.startswith(_FRESH) and weight.shape != parameter.shape:
            continue
        parameter.copy_(weight)


def carried(before: dict[str, Tensor], before_config: Json, model: ClipModel) -> dict[str, Tensor]:
    """Return the weights that `carry_weights` would leave in the model, which keeps its own."""
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    carry_weights(before, before_config, model)
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own[name])
    return found


def image_positions(model_config: Json) -> str:
    """Return how the image tower's positions are made: `learnable` or `sin_cos_2d`."""
    return str(model_config["vision_cfg"].get("pos_embed_type", "learnable"))
