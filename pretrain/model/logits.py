"""logit = scale * score + bias: where the two start, and whether they are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Logits:
    """The start of the logit scale exp(s) and of the bias (None: there is none)."""

    scale: float
    bias: float | None = None
    learnable: bool = True

    def start(self, clip: Any) -> None:
        """Set them in an open_clip CLIP, whose `logit_scale` is the logarithm."""
        clip.logit_scale.data.fill_(math.log(self.scale))
        clip.logit_scale.requires_grad_(self.learnable)
        if self.bias is not None:
            clip.logit_bias.data.fill_(self.bias)
            clip.logit_bias.requires_grad_(self.learnable)
