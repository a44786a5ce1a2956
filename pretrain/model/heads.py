"""What only training needs beside the towers: heads of SLIP and BYOL, maps to a teacher's space.

They are in the engine's state, to resume from, and not in the evaluation-ready model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def _mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 256)
    )


class Heads(nn.Module):
    """Empty by default.

    views: SLIP's MLP (arXiv:2112.12750): image width -> `view_width` twice -> 256, with LayerNorm
        where SLIP has BatchNorm, whose statistics would depend on the number of ranks.
    mean_projector, mean_predictor: BYOL's MLPs (arXiv:2006.07733), as A-CLIP has them: image width
        -> `mean_width` -> 256, 256 -> `mean_width` -> 256, with LayerNorm for the same reason.
    image, text: CLIP-KD's linear maps to the teacher's width (arXiv:2307.12732), where it differs.
    """

    def __init__(
        self,
        *,
        image_width: int = 0,
        view_width: int | None = None,
        mean_width: int | None = None,
        embed_dim: int = 0,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.views: nn.Module | None = None
        if view_width is not None:
            self.views = nn.Sequential(
                *(nn.Linear(image_width, view_width), nn.LayerNorm(view_width), nn.ReLU()),
                *(nn.Linear(view_width, view_width), nn.LayerNorm(view_width), nn.ReLU()),
                nn.Linear(view_width, 256),
            )
        self.mean_projector: nn.Module | None = None
        self.mean_predictor: nn.Module | None = None
        if mean_width is not None:
            self.mean_projector = _mlp(image_width, mean_width)
            self.mean_predictor = _mlp(256, mean_width)
        self.image: nn.Module | None = None
        self.text: nn.Module | None = None
        if teacher_dim is not None:
            same = teacher_dim == embed_dim
            self.image = nn.Identity() if same else nn.Linear(embed_dim, teacher_dim)
            self.text = nn.Identity() if same else nn.Linear(embed_dim, teacher_dim)
            self.log_cross_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def to_teacher(self, image_bD: Tensor, text_bD: Tensor) -> dict[str, Tensor]:
        """Return the fields of `Features` that hold the student in the teacher's space."""
        assert self.image is not None, "the model was built without a teacher"
        assert self.text is not None
        dtype = torch.promote_types(self.log_cross_scale.dtype, torch.float32)
        return {
            "student_image_bE": self.image(image_bD),
            "student_text_bE": self.text(text_bD),
            "cross_scale": self.log_cross_scale.to(dtype).exp(),
        }
