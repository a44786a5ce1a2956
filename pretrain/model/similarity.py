"""The geometry that a model is trained in: carried by the model, used by its objective, stored in
its checkpoint (`pairmill.similarity` in open_clip_config.json), obeyed by every evaluation.

This module holds the contract and the names, and imports no torch: a configuration can be read
without it. The mathematics is in geometries.py.

    similarity = load_similarity(folder)
    image_nD = similarity.embed_image(tower_output_nD)      # each tower's raw output, never
    text_mD = similarity.embed_text(tower_output_mD)        # normalized before
    similarity.scores(image_nD, text_mD)                    # [n, m], higher is nearer

Legend of shape suffixes: n, m rows; C classes; T templates; D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from configs.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_FILE = "open_clip_config.json"
# In model_cfg where open_clip has no such model: its constructor refuses the unknown key by name.
NEEDS_PAIRMILL = "needs_pairmill"
Curvature = Annotated[float, Field(ge=0.1, le=10.0)]  # of the space: -c; MERU's limits
TowerScale = Annotated[float, Field(gt=0)]
Score = Literal["distance", "squared", "inner"]  # minus the first two, or the inner product


class Similarity(Protocol):
    """How two embeddings compare. Half precision is raised to float32, float64 stays."""

    name: str
    initial_logit_scale: float  # where the papers start exp(s) in this geometry

    def embed_image(self, feature_nD: Tensor) -> Tensor:
        """Return image features [n, D] as the scores take them, from the tower's raw output."""
        ...

    def embed_text(self, feature_nD: Tensor) -> Tensor:
        """Return text features [n, D] as the scores take them, from the tower's raw output."""
        ...

    def class_vectors(self, text_CTD: Tensor) -> Tensor:
        """Return one embedded vector a class [C, D] from the raw features of its prompts."""
        ...

    def scores(self, image_nD: Tensor, text_mD: Tensor) -> Tensor:
        """Return similarities [n, m] of embedded features, without logit scale."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is learned (curvature, scales of the towers); nothing in most geometries."""
        ...

    def section(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the configuration section that rebuilds it with `weights` of its parameters."""
        ...


class Cones(Similarity, Protocol):
    """A geometry in which a text can entail an image: the image lies in the text's cone."""

    def exterior_angle(self, text_nD: Tensor, image_nD: Tensor) -> Tensor:
        """Return the angle [n] at the text between the axis of its cone and the image."""
        ...

    def half_aperture(self, text_nD: Tensor, min_radius: float) -> Tensor:
        """Return half the opening [n] of the texts' cones; wider nearer to the origin."""
        ...


HAVE_CONES = ("euclidean", "lorentz")
similarities: Registry[Similarity] = Registry("similarity")


@similarities.register("cosine")
def cosine() -> Similarity:
    """Cosine of the angle (CLIP, arXiv:2103.00020)."""
    from pretrain.model.geometries import Cosine

    return Cosine()


@similarities.register("elliptic")
def elliptic() -> Similarity:
    """Minus the angle on the unit sphere (arXiv:2409.13079)."""
    from pretrain.model.geometries import Elliptic

    return Elliptic()


@similarities.register("euclidean")
def euclidean(*, score: Score = "squared") -> Similarity:
    """Minus the squared distance of D^-1/2 f, f not normalized (EuCLIP, arXiv:2409.13079)."""
    from pretrain.model.geometries import Euclidean

    return Euclidean(score)


@similarities.register("lorentz")
def lorentz(
    *,
    score: Score = "distance",
    curvature: Curvature = 1.0,
    image_scale: TowerScale = 1.0,
    text_scale: TowerScale = 1.0,
    learnable: bool = True,
) -> Similarity:
    """Minus the distance on a hyperboloid of curvature -c (MERU, arXiv:2304.09172).

    The scales multiply D^-1/2; `learnable` is for the curvature and both scales.
    """
    from pretrain.model.geometries import Lorentz

    return Lorentz(score, curvature, image_scale, text_scale, learnable)


def similarity_of(config: dict[str, Any]) -> Similarity:
    """Return the similarity that an open_clip_config.json asks for; cosine where it names none."""
    section = dict(config.get("pairmill", {}).get("similarity", {"name": "cosine"}))
    similarity = similarities[section.pop("name")](**section)
    for parameter in similarity.parameters():
        parameter.requires_grad_(False)  # stored values are not learned further
    return similarity


def load_similarity(folder: Path) -> Similarity:
    """Return the similarity of a model folder (one with an open_clip_config.json)."""
    return similarity_of(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
