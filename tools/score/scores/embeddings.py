"""Image and text vectors, for the selectors: semantic duplicates, subsets, poison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.errors import ConfigError
from tools.score.base import Batch, Score, VectorsName, scores


class _Embeddings(Score):
    uses_model = True

    def score(self, batch: Batch) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        if "image" in self.vectors:
            found[self.vectors["image"]] = batch.images.numpy()
        if "text" in self.vectors:
            found[self.vectors["text"]] = batch.texts().numpy()
        return found


@scores.register("embeddings")
def embeddings(
    *, image: VectorsName | None = "clip_image", text: VectorsName | None = "clip_text"
) -> Score:
    """Embedded images and captions as float16 vectors beside the index (curation/vectors.py).

    Under the cosine geometry they have length 1; else they are the points that the model's
    similarity compares. `image` and `text` name the vectors; null: not wanted.
    """
    if image is None and text is None:
        raise ConfigError("embeddings: both `image` and `text` are null; name one of them.")
    return _Embeddings(columns={}, vectors={"image": image, "text": text})
