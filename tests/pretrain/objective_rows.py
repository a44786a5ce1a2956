"""One row for every registered objective, in every geometry that changes its path."""

from __future__ import annotations

import torch

from configs.load import validate
from configs.registry import Config
from pretrain.config import Objectives
from pretrain.model.clip import ClipModel
from pretrain.model.heads import Heads
from pretrain.model.logits import Logits
from pretrain.model.similarity import similarities
from pretrain.objectives import Total
from tests.pretrain.conftest import TINY_MODEL

# (a run's `objective`, its `similarity`). A new objective adds its row here.
ROWS = [
    ({"name": "clip", "chunk_rows": 3}, {"name": "cosine"}),
    ({"name": "clip", "label_smoothing": 0.1}, {"name": "elliptic"}),
    ({"name": "clip"}, {"name": "euclidean", "score": "squared"}),
    ({"name": "clip"}, {"name": "euclidean", "score": "distance"}),
    ({"name": "clip"}, {"name": "euclidean", "score": "inner"}),
    ([{"name": "clip"}, {"name": "entailment", "weight": 0.2}], {"name": "euclidean"}),
    ([{"name": "clip"}, {"name": "entailment", "weight": 0.2}], {"name": "lorentz"}),
    ({"name": "clip", "chunk_rows": 2}, {"name": "lorentz", "score": "squared"}),
    ({"name": "siglip", "exchange": "gather"}, {"name": "lorentz", "score": "inner"}),
    ({"name": "siglip", "exchange": "ring", "chunk_rows": 3}, {"name": "cosine"}),
    ({"name": "infoloob", "chunk_rows": 3}, {"name": "cosine"}),
    ({"name": "cloob", "chunk_rows": 3}, {"name": "cosine"}),
    ([{"name": "clip"}, {"name": "simclr", "chunk_rows": 3}], {"name": "cosine"}),
    ({"name": "negclip"}, {"name": "cosine"}),
    ({"name": "triplet"}, {"name": "cosine"}),
    ({"name": "distill_relation", "chunk_rows": 3}, {"name": "lorentz"}),
    (
        [
            {"name": "clip", "matryoshka": [8, 32]},
            {"name": "distill_relation", "divergence": "cross_entropy"},
            {"name": "distill_interaction"},
            {"name": "distill_feature", "weight": 2000.0},
        ],
        {"name": "cosine"},
    ),
    (
        [
            {"name": "clip_views", "chunk_rows": 3},
            {"name": "simclr"},
            {"name": "byol", "weight": 2.0},
        ],
        {"name": "cosine"},
    ),
]
IDS = [f"{i}-{row[0]}"[:60] for i, row in enumerate(ROWS)]
TEACHER_DIM = 24
_FIELDS = {  # what an objective needs: the keywords of ClipModel.forward that bring it
    "views": ("view_bv3HW",),
    "negative_text": ("negative_token_bL",),
    "negative_image": ("negative_image_b3HW",),
    "second_image": ("view_bv3HW", "kept_view_bvK"),
    "mean_target": ("view_bv3HW", "kept_view_bvK", "mean_target_bP"),
    "teacher": ("teacher",),
}


class _Section(Config):
    objective: Objectives


def total_of(objective: object) -> Total:
    return Total(validate({"objective": objective}, _Section, label="test").objective)


def model_of(similarity: dict[str, object], total: Total, layers: int = 2) -> ClipModel:
    """A tiny model with the heads that the objectives need, equal on every rank."""
    torch.manual_seed(0)
    keywords = dict(similarity)
    vision, text = (TINY_MODEL[tower] | {"layers": layers} for tower in ("vision_cfg", "text_cfg"))
    return ClipModel(
        {**TINY_MODEL, "vision_cfg": vision, "text_cfg": text | {"vocab_size": 20}},
        similarities[str(keywords.pop("name"))](**keywords),
        logits=total.logits or Logits(scale=5.0),
        heads=Heads(
            image_width=32,
            view_width=16 if "views" in total.needs else None,
            mean_width=16 if "mean_target" in total.needs else None,
            embed_dim=32,
            teacher_dim=TEACHER_DIM if "teacher" in total.needs else None,
        ),
    )


def inputs_of(
    size: int, total: Total, rows: slice, dtype: torch.dtype = torch.float32
) -> dict[str, object]:
    """The keywords of ClipModel.forward that the objectives need, of some rows of a batch."""
    wanted = {"image_b3HW", "token_bL", "kept_bK"}
    wanted.update(field for need in total.needs for field in _FIELDS[need])
    inputs: dict[str, object] = {
        name: value[rows] for name, value in _everything(size).items() if name in wanted
    }
    if "teacher" in wanted:
        image, text = _teacher(size, dtype)
        inputs["teacher"] = (image[rows], text[rows], torch.tensor([20.0]))
    return inputs


def _everything(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, 3, 16, 16), dtype=torch.uint8, generator=generator)

    return {
        "image_b3HW": pixels(size),
        "token_bL": torch.randint(0, 20, (size, 8), generator=generator),
        "kept_bK": torch.rand(size, 16, generator=generator).argsort(1)[:, :8].sort(1).values,
        "view_bv3HW": pixels(size, 2),
        "negative_token_bL": torch.randint(0, 20, (size, 8), generator=generator),
        "negative_image_b3HW": pixels(size),
        "kept_view_bvK": torch.rand(size, 2, 16, generator=generator).argsort(2)[..., :8],
        "mean_target_bP": torch.randn(size, 256, generator=generator),
    }


def _teacher(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, size, TEACHER_DIM, generator=generator, dtype=torch.float64)
    image, text = torch.nn.functional.normalize(drawn, dim=-1).to(dtype)
    return image, text
