"""Attentive masking (A-CLIP, Yang et al., arXiv:2212.08653, section 3.2): an exponential moving
average of the image tower says which patches of each view the online tower sees.

    score of a patch   the attention of the class token to it, mean over all layers and heads, in
                       the crop that encloses the views
    of a view          the map of scores, read bilinearly at the places of the view's patches
    kept               the blocks of 2 x 2 patches with the highest mean score

The average moves after each step: average <- m average + (1 - m) weight, m from 0.996 to 1 along a
half cosine of the run. It is fp32 and whole on every rank; the checkpoint has it by parameter name.
Beside the tower it has the projector of BYOL (objectives/aclip.py), whose target it gives. A-CLIP
averages the text tower too, for evaluation alone: that is `ema` here.

Legend: b local samples, v views, L = s s patches, K kept ones, R W patches along a side, P width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from pretrain.model.clip import ClipModel
from pretrain.model.patches import PatchGather
from pretrain.reduction.image import AttentivePatches

_VISUAL, _PROJECTOR = "clip.visual.", "heads.mean_projector."  # of ClipModel


class Attended(NamedTuple):
    """What the average gives for a batch."""

    kept_bvK: Tensor  # int64, ascending: which patches of each view stay
    target_bP: Tensor | None  # BYOL's target, where the model has its heads


class MeanTower(nn.Module):
    """The average of a ClipModel's image tower (and BYOL's projector), on one rank."""

    def __init__(self, model: ClipModel, reduction: AttentivePatches, precision: str) -> None:
        """Start at the weights of `model`. Raises ConfigError where it has no class attention."""
        super().__init__()
        visual = model.clip.visual
        kinds = {type(getattr(block, "attn", None)) for block in visual.transformer.resblocks}
        if kinds != {nn.MultiheadAttention}:
            raise ConfigError(
                "reduction attentive reads the attention of open_clip's plain transformer; this "
                "model's blocks are others: choose a model JSON without their options."
            )
        self.reduction, self._side, self._precision = reduction, model.patch_rows, precision
        reduction.num_kept(self._side)
        self.visual = copy.deepcopy(visual)
        self.visual.patch_dropout = PatchGather()  # takes everything
        self.projector = copy.deepcopy(model.heads.mean_projector)
        self.float().eval().requires_grad_(False)

    def named_averages(self) -> dict[str, Tensor]:
        """Return the averages by the names that ClipModel has for the parameters."""
        found = {f"{_VISUAL}{n}": p.data for n, p in self.visual.named_parameters()}
        if self.projector is not None:
            found |= {f"{_PROJECTOR}{n}": p.data for n, p in self.projector.named_parameters()}
        return found

    def sources(self, model: ClipModel) -> list[nn.Parameter]:
        """Return the parameters of the online model that `update` takes, in its order."""
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.named_averages()]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], progress: float) -> None:
        """Move towards whole weights (in the order of `sources`) after a step of the online model;
        `progress` is the share of the run that is done.
        """
        averages = list(self.named_averages().values())
        moved = 1.0 - self.reduction.momentum_at(progress)
        torch._foreach_lerp_(averages, [weight.float() for weight in weights], moved)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take whole averages by name; those that are not among them stay."""
        for name, average in self.named_averages().items():
            if name in averages:
                average.copy_(averages[name].view_as(average))

    @torch.no_grad()
    def forward(self, pixels_b3HW: Tensor, corner_bv4: Tensor) -> Attended:
        """Return which patches of each view stay, and BYOL's target.

        The pixels are normalized ones of the enclosing crop; `corner_bv4` are the corners of the
        views in it: left, top, right, bottom in [0, 1], left above right where it is mirrored.
        """
        with self._autocast(pixels_b3HW.device):
            score_bL, pooled = attention_scores(self.visual, pixels_b3HW.float())
            target = None if self.projector is None else self.projector(pooled).float()
        view_bvL = view_scores(score_bL, corner_bv4, self._side)
        num_blocks = self.reduction.num_blocks(self._side)
        kept = kept_patches(view_bvL.flatten(0, 1), self._side, self.reduction.window, num_blocks)
        return Attended(kept.view(*view_bvL.shape[:2], -1), target)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self._precision == "fp32":
            return nullcontext()
        half = torch.bfloat16 if self._precision == "bf16" else torch.float16
        return torch.autocast(device.type, dtype=half)


def attention_scores(visual: Any, pixels_b3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class token's attention to each patch, the mean over layers and heads [b, L], and
    the pooled feature [b, W] before the last map.
    """
    x = visual._embeds(pixels_b3HW)
    blocks = visual.transformer.resblocks
    score_bL = torch.zeros(len(x), x.shape[1] - 1, device=x.device)
    for block in blocks:
        score_bL += _class_attention(block.attn, block.ln_1(x))
        x = block(x)
    pooled, _ = visual._pool(x)
    return score_bL / len(blocks), pooled


def _class_attention(attention: nn.MultiheadAttention, x_bTW: Tensor) -> Tensor:
    """Return the mean over heads of softmax(q_class k / sqrt(width of a head)), patches alone."""
    width, heads = attention.embed_dim, attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = functional.linear(x_bTW[:, :1], weight[:width], bias[:width])
    key = functional.linear(x_bTW, weight[width : 2 * width], bias[width : 2 * width])
    query, key = (y.view(*y.shape[:2], heads, -1).transpose(1, 2) for y in (query, key))
    logits_bH1T = query @ key.transpose(-2, -1) / (width // heads) ** 0.5
    mean_b1T: Tensor = logits_bH1T.float().softmax(dim=-1).mean(dim=1)
    return mean_b1T[:, 0, 1:]


def view_scores(score_bL: Tensor, corner_bv4: Tensor, side: int) -> Tensor:
    """Return the scores of each view's patches [b, v, side * side], read bilinearly off the map of
    the enclosing crop at the centres of the patches.
    """
    num_views = corner_bv4.shape[1]
    rows = round(score_bL.shape[1] ** 0.5)
    map_b1RR = score_bL.view(-1, 1, rows, rows)
    centre_s = (torch.arange(side, device=score_bL.device) + 0.5) / side
    left, top, right, bottom = corner_bv4.float().unbind(-1)
    x_bvs = left[..., None] + (right - left)[..., None] * centre_s
    y_bvs = top[..., None] + (bottom - top)[..., None] * centre_s
    x_bvss = x_bvs[:, :, None, :].expand(-1, -1, side, -1)
    y_bvss = y_bvs[:, :, :, None].expand(-1, -1, -1, side)
    place_bvs2 = torch.stack([x_bvss, y_bvss], dim=-1).flatten(1, 2) * 2 - 1
    found = functional.grid_sample(map_b1RR, place_bvs2, padding_mode="border", align_corners=False)
    return found.view(-1, num_views, side * side)


def kept_patches(score_nL: Tensor, side: int, window: int, num_blocks: int) -> Tensor:
    """Return the patches of the `num_blocks` blocks with the highest mean score [n, K], ascending.

    Of equal blocks the first one stays.
    """
    block_n = functional.avg_pool2d(score_nL.view(-1, 1, side, side), window).flatten(1)
    order = block_n.argsort(dim=1, descending=True, stable=True)
    stays = torch.zeros_like(block_n, dtype=torch.bool).scatter_(1, order[:, :num_blocks], True)
    blocks = stays.view(-1, side // window, side // window)
    patches = blocks.repeat_interleave(window, 1).repeat_interleave(window, 2).flatten(1)
    # Not nonzero: its size would have to come back from the device.
    return (~patches).to(torch.uint8).argsort(dim=1, stable=True)[:, : num_blocks * window**2]
