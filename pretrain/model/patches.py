"""Gather the patches and text tokens that token reduction keeps, after positions are added (FLIP,
arXiv:2212.00794).

What stays is data: the loader draws the indices and ships them with the batch, so that masks are
the same at any world size. PatchGather stands where open_clip's own random PatchDropout would.

Legend: b samples, L patches or tokens, K kept ones, W width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.torchvision_ops import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
from open_clip.transformer import text_global_pool  # noqa: E402


class PatchGather(nn.Module):
    """Keep the class token and the patches of `kept_bK`; the identity where that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_bK: Tensor | None = None

    @contextmanager
    def keeping(self, kept_bK: Tensor | None) -> Iterator[None]:
        """Within it, keep these patches of the images that are encoded."""
        self.kept_bK = kept_bK
        try:
            yield
        finally:
            self.kept_bK = None

    def forward(self, token_bLW: Tensor) -> Tensor:
        """Return [b, 1 + K, W] of [b, 1 + L, W]."""
        if self.kept_bK is None:
            return token_bLW
        width = token_bLW.shape[-1]
        index_bKW = self.kept_bK.long().unsqueeze(-1).expand(-1, -1, width)
        patch_bKW = torch.gather(token_bLW[:, 1:], 1, index_bKW)
        return torch.cat([token_bLW[:, :1], patch_bKW], dim=1)


def encode_text(clip: open_clip.CLIP, token_bL: Tensor, kept_bK: Tensor | None) -> Tensor:
    """Return open_clip's text features [b, D]; with `kept_bK` of those positions alone, ascending.

    A token keeps the position embedding of the place where it stood; causal attention and pooling
    see the tokens that are left, so that the end token must be one of them.
    """
    if kept_bK is None:
        encoded: Tensor = clip.encode_text(token_bL)
        return encoded
    index_bK = kept_bK.long()
    kept_token_bK = token_bL.gather(1, index_bK)
    dtype = clip.transformer.get_cast_dtype()
    x = clip.token_embedding(kept_token_bK).to(dtype)
    x = x + functional.embedding(index_bK, clip.positional_embedding).to(dtype)
    num_kept = index_bK.shape[1]
    mask = None if clip.attn_mask is None else clip.attn_mask[:num_kept, :num_kept]
    x = clip.ln_final(clip.transformer(x, attn_mask=mask))
    eos = getattr(clip, "text_eos_id", None)
    x = text_global_pool(x, kept_token_bK, clip.text_pool_type, eos_token_id=eos)
    projection = clip.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    features: Tensor = x
    return features
