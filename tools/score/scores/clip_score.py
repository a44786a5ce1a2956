"""The CLIP score: how similar a model finds an image and its caption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.score.base import Batch, Column, Score, scores


class _ClipScore(Score):
    uses_model = True

    def score(self, batch: Batch) -> Mapping[str, Any]:
        return {self.columns["column"]: batch.paired(batch.images, batch.texts())}


@scores.register("clip_score")
def clip_score(*, column: Column = "clip_score") -> Score:
    """Similarity of image and caption, as LAION and DataComp filter by (arXiv:2111.02114,
    2304.14108).

    Under the cosine geometry it is open_clip's cosine, in [-1, 1]; else the model's own similarity
    (minus a distance, an inner product), without logit scale. Of several captions the first counts.
    Not Hessel's CLIPScore, which is 2.5 max(cosine, 0) with a prompt (evaluation/methods).
    """
    return _ClipScore(columns={"column": column})
