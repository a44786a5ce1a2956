"""The similarities of similarity.py: cosine, elliptic, Euclidean, Lorentz (arXiv:2103.00020,
2409.13079, 2304.09172).

All of them compute in float32 at least, and give neither NaN nor infinite gradients for coincident,
zero, tiny or huge features; features that are not finite stay so, for the trainer to see.

Legend: n, m rows; C classes; T templates; D width; c minus the curvature; x text, y image; xs the
space part of a point of the hyperboloid, xt = sqrt(1/c + |xs|^2) its time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LOG_CURVATURE_LIMITS = (math.log(0.1), math.log(10.0))  # held by the trainer after each step (MERU)
_LARGEST_LENGTH = 1.0e15  # its square, times 100 and a batch, is still a float32
_LARGEST_RADIUS = math.asinh(2.0**15)  # MERU's limit of the exponential map


def _checked(feature_nD: Tensor) -> Tensor:
    """Raise to float32 at least, and bound the length; infinity becomes NaN rather than a bound."""
    feature_nD = feature_nD.to(torch.promote_types(feature_nD.dtype, torch.float32))
    limit = _LARGEST_LENGTH / math.sqrt(feature_nD.shape[-1])
    return feature_nD.clamp(-limit, limit) + (feature_nD - feature_nD)


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _squared_distances(x_nD: Tensor, y_mD: Tensor) -> Tensor:
    # The difference of large squares may round to below zero; no gradient flows there.
    products_nm = x_nD @ y_mD.T
    squares_nm = x_nD.square().sum(-1)[:, None] + y_mD.square().sum(-1)[None, :]
    return (squares_nm - 2 * products_nm).clamp_min(0)


def _arccos(cosine: Tensor) -> Tensor:
    """Return arccos, kept off +-1, where its slope is infinite."""
    limit = 1 - _eps(cosine)
    return cosine.clamp(-limit, limit).arccos()


def _arcsin_up_to_one(ratio: Tensor) -> Tensor:
    """Return arcsin(min(1, ratio)) of ratio >= 0; flat from 1 on."""
    inside = ratio.clamp_max(1 - _eps(ratio)).arcsin()
    return torch.where(ratio < 1, inside, math.pi / 2)


class Geometry(nn.Module):
    """What they have in common: towers that embed alike, nothing learned, prompts averaged raw."""

    name: str
    initial_logit_scale = 1 / 0.07

    def embed(self, feature_nD: Tensor) -> Tensor:
        """Return features as the scores take them, of a geometry that treats both towers alike."""
        raise NotImplementedError

    def embed_image(self, feature_nD: Tensor) -> Tensor:
        """Return image features as the scores take them."""
        return self.embed(feature_nD)

    def embed_text(self, feature_nD: Tensor) -> Tensor:
        """Return text features as the scores take them."""
        return self.embed(feature_nD)

    def class_vectors(self, text_CTD: Tensor) -> Tensor:
        """Average the raw features over the templates, then embed (EuCLIP's and MERU's order)."""
        return self.embed_text(text_CTD.mean(dim=1))

    def section(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the section that rebuilds it."""
        return {"name": self.name}


class Cosine(Geometry):
    """Cosine similarity on the unit sphere."""

    name = "cosine"

    def embed(self, feature_nD: Tensor) -> Tensor:
        """Return rows of length 1."""
        return nn.functional.normalize(_checked(feature_nD), dim=-1)

    def class_vectors(self, text_CTD: Tensor) -> Tensor:
        """Normalize, average over the templates, normalize: OpenAI's order of operations."""
        return self.embed(self.embed(text_CTD).mean(dim=1))

    def scores(self, image_nD: Tensor, text_mD: Tensor) -> Tensor:
        """Return the cosines of unit vectors."""
        return image_nD @ text_mD.T


class Elliptic(Cosine):
    """Minus the angle: the geodesic distance on the unit sphere."""

    name = "elliptic"

    def scores(self, image_nD: Tensor, text_mD: Tensor) -> Tensor:
        """Return minus the angles of unit vectors."""
        return -_arccos(image_nD @ text_mD.T)


class Euclidean(Geometry):
    """Features of any length, divided by sqrt(D) so that their length does not grow with D."""

    name = "euclidean"

    def __init__(self, score: str) -> None:
        super().__init__()
        self.score = score
        if score == "squared":
            self.initial_logit_scale = 1.0

    def section(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the section that rebuilds it."""
        return {"name": self.name, "score": self.score}

    def embed(self, feature_nD: Tensor) -> Tensor:
        """Return D^-1/2 f."""
        return _checked(feature_nD) * float(feature_nD.shape[-1] ** -0.5)

    def scores(self, image_nD: Tensor, text_mD: Tensor) -> Tensor:
        """Return minus distances, minus squared distances, or inner products."""
        if self.score == "inner":
            return image_nD @ text_mD.T
        squared_nm = _squared_distances(image_nD, text_mD)
        if self.score == "squared":
            return -squared_nm
        return -squared_nm.clamp_min(_eps(squared_nm) ** 2).sqrt()  # slope of the root: finite

    def exterior_angle(self, text_nD: Tensor, image_nD: Tensor) -> Tensor:
        """Return arccos((y - x).x / |y - x||x|); 0 where the points coincide or x is the origin."""
        step_nD = image_nD - text_nD
        lengths_n = step_nD.norm(dim=-1) * text_nD.norm(dim=-1)
        apart = lengths_n > _eps(lengths_n)
        cosine_n = (step_nD * text_nD).sum(-1) / torch.where(apart, lengths_n, 1)
        return torch.where(apart, _arccos(cosine_n), 0)

    def half_aperture(self, text_nD: Tensor, min_radius: float) -> Tensor:
        """Return arcsin(min(1, K / |x|))."""
        return _arcsin_up_to_one(min_radius / _length(text_nD))


class Lorentz(Geometry):
    """The upper sheet of a hyperboloid: points are stored by their space part.

    The towers' outputs, times a learned scale each, are tangents at the origin (exponential map).
    """

    name = "lorentz"

    def __init__(
        self, score: str, curvature: float, image_scale: float, text_scale: float, learnable: bool
    ) -> None:
        super().__init__()
        self.score = score
        self.learnable = learnable
        if score == "squared":
            self.initial_logit_scale = 1.0

        def log(value: float) -> nn.Parameter:
            return nn.Parameter(torch.tensor([math.log(value)]), requires_grad=learnable)

        self.log_curvature = log(curvature)
        self.log_image_scale = log(image_scale)
        self.log_text_scale = log(text_scale)

    def section(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the section that rebuilds it with the learned values."""
        names = ("curvature", "image_scale", "text_scale")
        values = {name: float(weights[f"log_{name}"].detach().double().exp()) for name in names}
        return {"name": self.name, "score": self.score, **values, "learnable": self.learnable}

    def _curvature(self, like: Tensor) -> Tensor:
        return self.log_curvature.to(like.dtype).exp()

    def embed_image(self, feature_nD: Tensor) -> Tensor:
        """Return the space part of the point that an image's tangent leads to."""
        return self._lift(feature_nD, self.log_image_scale)

    def embed_text(self, feature_nD: Tensor) -> Tensor:
        """Return the space part of the point that a text's tangent leads to."""
        return self._lift(feature_nD, self.log_text_scale)

    def _lift(self, feature_nD: Tensor, log_scale: Tensor) -> Tensor:
        """The exponential map at the origin: sinh(r) / r * x with r = sqrt(c) |x|."""
        feature_nD = _checked(feature_nD)
        tangent_nD = feature_nD * (
            log_scale.to(feature_nD.dtype).exp() * feature_nD.shape[-1] ** -0.5
        )
        radius_n1 = self._curvature(feature_nD).sqrt() * _length(tangent_nD, keepdim=True)
        lifted_nD: Tensor = radius_n1.clamp_max(_LARGEST_RADIUS).sinh() / radius_n1 * tangent_nD
        return lifted_nD

    def to_tangent(self, point_nD: Tensor) -> Tensor:
        """Return the tangents at the origin that lead to the points (the logarithmic map)."""
        radius_n1 = self._curvature(point_nD).sqrt() * _length(point_nD, keepdim=True)
        return radius_n1.asinh() / radius_n1 * point_nD

    def _time(self, point_nD: Tensor) -> Tensor:
        squared_n: Tensor = 1 / self._curvature(point_nD) + point_nD.square().sum(-1)
        return squared_n.sqrt()

    def scores(self, image_nD: Tensor, text_mD: Tensor) -> Tensor:
        """Return minus distances, minus squared distances, or Lorentz inner products."""
        times_nm = self._time(image_nD)[:, None] * self._time(text_mD)[None, :]
        inner_nm = image_nD @ text_mD.T - times_nm
        if self.score == "inner":
            return inner_nm
        curvature = self._curvature(image_nD)
        # arccosh has an infinite slope at 1, which coincident points reach, or pass by rounding.
        distance_nm = (-curvature * inner_nm).clamp_min(1 + 4 * _eps(inner_nm)).arccosh()
        distance_nm = distance_nm / curvature.sqrt()
        return -distance_nm.square() if self.score == "squared" else -distance_nm

    def exterior_angle(self, text_nD: Tensor, image_nD: Tensor) -> Tensor:
        """Return MERU's equation 6; 0 where the points coincide or x is the origin."""
        text_time_n, image_time_n = self._time(text_nD), self._time(image_nD)
        inner_n = (text_nD * image_nD).sum(-1) - text_time_n * image_time_n
        inner_n = self._curvature(text_nD) * inner_n
        excess_n = inner_n.square() - 1
        length_n = text_nD.norm(dim=-1)
        apart = (excess_n > 16 * _eps(excess_n)) & (length_n > _eps(length_n))
        across_n = torch.where(apart, length_n, 1) * torch.where(apart, excess_n, 1).sqrt()
        cosine_n = (image_time_n + text_time_n * inner_n) / across_n
        return torch.where(apart, _arccos(cosine_n), 0)

    def half_aperture(self, text_nD: Tensor, min_radius: float) -> Tensor:
        """Return arcsin(min(1, 2 K / (sqrt(c) |x|))), MERU's equation 5."""
        root_c = self._curvature(text_nD).sqrt()
        return _arcsin_up_to_one(2 * min_radius / (root_c * _length(text_nD)))


def _length(x_nD: Tensor, *, keepdim: bool = False) -> Tensor:
    """Return lengths, at least a number whose inverse is finite; no gradient flows below it."""
    length_n: Tensor = torch.linalg.vector_norm(x_nD, dim=-1, keepdim=keepdim)
    return length_n.clamp_min(_eps(x_nD) ** 2)
