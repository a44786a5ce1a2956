"""Which parameters learn how fast: groups of the optimizer by tower, depth and kind.

Gains, biases, scalars, the class token and positions do not decay (FLIP, CLIPA, open_clip). With a
layer decay d a tower of L blocks learns at d^(L + 1 - i): i = 0 for the patches, tokens and
positions, i = 1 .. L for block i, L + 1 for what follows the last block (BEiT, arXiv:2106.08254;
EVA-CLIP, arXiv:2303.15389).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from pretrain.config import PretrainConfig, TowerConfig
from pretrain.model.clip import ClipModel

_BLOCK = re.compile(r"resblocks\.(\d+)\.")
_BEFORE_BLOCKS = (
    "conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding",
)  # fmt: skip
_NEVER_DECAYED = ("positional_embedding", "class_embedding")
_OWN_TOWER = ("clip.logit_scale", "clip.logit_bias")


class Place(NamedTuple):
    """Where a parameter stands: the tower (None: heads, geometry, logits) and its depth there."""

    tower: str | None
    depth: int  # 0 before the blocks, i in block i, L + 1 after them


def place(model: ClipModel, name: str) -> Place:
    """Return the place of a parameter by its name in ClipModel."""
    if not name.startswith("clip.") or name in _OWN_TOWER:
        return Place(None, 0)
    tower = "image" if name.startswith("clip.visual.") else "text"
    block = _BLOCK.search(name)
    if block:
        return Place(tower, 1 + int(block[1]))
    before = any(part in name.split(".") for part in _BEFORE_BLOCKS)
    return Place(tower, 0 if before else num_blocks(model, tower) + 1)


def num_blocks(model: ClipModel, tower: str) -> int:
    """Return the number of transformer blocks of a tower."""
    clip = model.clip
    return len((clip.visual.transformer if tower == "image" else clip.transformer).resblocks)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter."""
    return parameter.ndim >= 2 and not any(part in name for part in _NEVER_DECAYED)


def parameter_groups(model: ClipModel, config: PretrainConfig) -> list[dict[str, Any]]:
    """Return the groups of learned parameters, each with `lr_scale` and `weight_decay`.

    A step's learning rate times `lr_scale` is a group's. Parameters keep the model's order.
    """
    base = config.optimizer.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, depth = place(model, name)
        section = TowerConfig() if tower is None else config.towers.of(tower)
        scale = 1.0 if section.learning_rate is None else section.learning_rate / base
        if tower is not None:
            scale *= section.layer_decay ** (num_blocks(model, tower) + 1 - depth)
        decay = config.optimizer.weight_decay
        if section.weight_decay is not None:
            decay = section.weight_decay
        key = (scale, decay if decays(name, parameter) else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def lock(model: ClipModel, config: PretrainConfig) -> None:
    """Freeze the locked towers (LiT, arXiv:2111.07991), but for their last `unlocked_groups`."""
    for name, parameter in model.named_parameters():
        tower, depth = place(model, name)
        if tower is None:
            continue
        section, last = config.towers.of(tower), num_blocks(model, tower) + 1
        if section.lock and depth <= last - section.unlocked_groups:
            parameter.requires_grad_(False)


def build_optimizer(model: ClipModel, config: PretrainConfig) -> torch.optim.Optimizer:
    """Return fused AdamW, or SGD without momentum, over the groups."""
    section = config.optimizer
    groups = parameter_groups(model, config)
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.learning_rate, fused=True)
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=True,
    )
