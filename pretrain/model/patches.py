"""Gather the patches that token reduction keeps, after positions are added (FLIP,
arXiv:2212.00794).

Which patches stay is data: the loader draws the indices and ships them with the batch, so that
masks are the same at any world size. This module stands where open_clip's own random PatchDropout
would.

Legend: b samples, L patches, K kept patches, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchGather(nn.Module):
    """Keep the class token and the patches of `kept_bK`; the identity where that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_bK: Tensor | None = None

    def forward(self, token_bLW: Tensor) -> Tensor:
        """Return [b, 1 + K, W] of [b, 1 + L, W]."""
        if self.kept_bK is None:
            return token_bLW
        width = token_bLW.shape[-1]
        index_bKW = self.kept_bK.long().unsqueeze(-1).expand(-1, -1, width)
        patch_bKW = torch.gather(token_bLW[:, 1:], 1, index_bKW)
        return torch.cat([token_bLW[:, :1], patch_bKW], dim=1)
