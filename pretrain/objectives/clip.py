"""InfoNCE over image-text pairs (CLIP, arXiv:2103.00020, figure 3; Oord et al., arXiv:1807.03748).

L = [CE(s I T^t) + CE(s T I^t)] / 2, the labels on the diagonal, s = exp(logit scale). Each rank
builds the two [b, B] matrices of its own rows against the global batch (local loss, gather with
gradient): exact at any number of ranks; see group.py.

Legend: b local pairs, B = b * group.size pairs of the global batch, D embedding width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from pretrain.model.clip import Features
from pretrain.model.similarity import Similarity
from pretrain.objectives.group import Group
from pretrain.objectives.registry import Loss, Objective, objectives


def clip_loss(features: Features, *, similarity: Similarity, group: Group) -> Loss:
    """Return InfoNCE, and the accuracy of picking the own pair in the global batch."""
    dtype = torch.promote_types(features.image_bD.dtype, torch.float32)
    image_bD, text_bD = features.image_bD.to(dtype), features.text_bD.to(dtype)
    scale = features.logit_scale.to(dtype)
    logits_i2t_bB = scale * similarity.scores(image_bD, group.gather(text_bD))
    logits_t2i_bB = scale * similarity.scores(group.gather(image_bD), text_bD).T
    own = torch.arange(len(image_bD), device=image_bD.device) + group.rank * len(image_bD)
    loss = (cross_entropy(logits_i2t_bB, own) + cross_entropy(logits_t2i_bB, own)) / 2
    with torch.no_grad():
        accuracy_i2t = (logits_i2t_bB.argmax(dim=1) == own).to(dtype).mean()
        accuracy_t2i = (logits_t2i_bB.argmax(dim=1) == own).to(dtype).mean()
    return Loss(loss, accuracy_i2t, accuracy_t2i)


@objectives.register("clip")
def clip() -> Objective:
    """InfoNCE (CLIP, arXiv:2103.00020)."""
    return clip_loss
