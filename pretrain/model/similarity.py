"""The geometry that a model is trained in: carried by the model, used by its objective, stored in
its checkpoint (`pairmill.similarity` in open_clip_config.json), obeyed by every evaluation.

Legend of shape suffixes: n, m rows; C classes; T templates; D embedding width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.registry import Registry

CONFIG_FILE = "open_clip_config.json"


class Similarity(Protocol):
    """How two embeddings compare."""

    name: str

    def normalize(self, features_nD: Tensor) -> Tensor:
        """Return the features as the scores take them."""
        ...

    def class_vectors(self, features_CTD: Tensor) -> Tensor:
        """Return one vector a class [C, D] from the features of its prompts, one a template."""
        ...

    def scores(self, image_nD: Tensor, text_mD: Tensor) -> Tensor:
        """Return similarities [n, m] of normalized features, without logit scale.

        Higher is nearer.
        """
        ...


similarities: Registry[Similarity] = Registry("similarity")


class Cosine:
    """Cosine similarity on the unit sphere (CLIP, arXiv:2103.00020)."""

    name = "cosine"

    def normalize(self, features_nD: Tensor) -> Tensor:
        """Return rows of length 1, in the features' own precision."""
        return torch.nn.functional.normalize(features_nD, dim=-1)

    def class_vectors(self, features_CTD: Tensor) -> Tensor:
        """Normalize, average over the templates, normalize: OpenAI's order of operations."""
        return self.normalize(self.normalize(features_CTD).mean(dim=1))

    def scores(self, image_nD: Tensor, text_mD: Tensor) -> Tensor:
        """Return the cosines of unit vectors."""
        return image_nD @ text_mD.T


@similarities.register("cosine")
def cosine() -> Similarity:
    """Cosine similarity (CLIP)."""
    return Cosine()


def similarity_of(config: dict[str, Any]) -> Similarity:
    """Return the similarity that an open_clip_config.json asks for; cosine where it names none."""
    section = dict(config.get("pairmill", {}).get("similarity", {"name": "cosine"}))
    return similarities[section.pop("name")](**section)


def load_similarity(folder: Path) -> Similarity:
    """Return the similarity of a model folder (one with an open_clip_config.json)."""
    return similarity_of(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
