"""Features of a second encoder, for AMU-Tuning: a timm model, another checkpoint, files, pixels.

timm:NAME              a timm model with its pretrained weights and its own preprocessing
checkpoint:CHECKPOINT  the image tower of any checkpoint that `pairmill evaluate` takes
file:FOLDER            train.npy, val.npy, test.npy: float [n, A] in the order of the samples
pixels                 the picture itself, 16 x 16 grey values: no weights, for demonstrations
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.errors import CheckpointError, DataError, UsageError
from evaluation.features import ImageTower
from evaluation.identity import choose_device, identify
from evaluation.pixel_baseline import SIDE_PIXELS, pixel_vector
from evaluation.subject import Subject
from evaluation.tar import file_sha256


@dataclass(frozen=True)
class TimmTower:
    """A timm model as an image tower: what stands before its classifier, pooled."""

    model: Any
    transform: Callable[[Image.Image], Tensor]
    device: torch.device

    def encode_images(self, pixels_b3HW: Tensor) -> Tensor:
        """Return features [b, A], float32 on the CPU."""
        with torch.no_grad():
            features: Tensor = self.model(pixels_b3HW.to(self.device))
        return features.float().cpu()


def load_timm(name: str, device: str = "auto") -> TimmTower:
    """Load a pretrained timm model without its classifier."""
    import timm

    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and its hub client each raise their own
        raise CheckpointError(
            f"auxiliary: timm could not load {name!r}: {error}. Expected a name of "
            "timm.list_pretrained() whose weights can be downloaded or are in its cache."
        ) from error
    target = choose_device(device)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    return TimmTower(model.to(target).eval(), transform, target)


class PixelTower:
    """The pixel baseline's vector of a picture as its features."""

    def transform(self, image: Image.Image) -> Tensor:
        """Return the vector [A]."""
        return torch.from_numpy(pixel_vector(image)).float()

    def encode_images(self, pixels_b3HW: Tensor) -> Tensor:
        """Return the vectors [b, A] themselves."""
        return pixels_b3HW


def auxiliary_identity(source: str) -> str:
    """Return what the features of an encoder depend on, in words and digests.

    Raises UsageError where `source` is none of the four kinds, and CheckpointError.
    """
    kind, _, name = source.partition(":")
    if kind == "file" and name:
        files = [Path(name) / f"{split}.npy" for split in ("train", "val", "test")]
        return " ".join(["files", *(file_sha256(path) for path in files if path.is_file())])
    if kind == "timm" and name:
        return f"timm {version('timm')} {name}"
    if kind == "checkpoint" and name:
        found = identify(name)
        return f"checkpoint {found.digest} {found.setting_digest}"
    if source == "pixels":
        return f"pixels {SIDE_PIXELS}"
    raise UsageError(
        f"auxiliary: got {source!r}; expected timm:MODEL, checkpoint:CHECKPOINT, file:FOLDER "
        "or pixels."
    )


def auxiliary_features(source: str, subject: Subject, split: str) -> Tensor:
    """Return the auxiliary features of a split [n, A], computed once and cached."""
    identity = auxiliary_identity(source)
    kind, _, name = source.partition(":")
    features, part = subject.features, subject.dataset.part(split)
    if kind == "file":
        return _from_file(Path(name) / f"{split}.npy", len(subject.split(split).part.samples))

    def tower() -> ImageTower:
        if kind == "timm":
            return load_timm(name, features.device)
        if kind == "pixels":
            return PixelTower()
        from evaluation.encoder import load_encoder

        return load_encoder(name, device=features.device)

    return features.auxiliary(identity, tower, subject.dataset.name, split, part)


def _from_file(path: Path, num_images: int) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"auxiliary: {path} cannot be read ({error}).") from None
    if array.ndim != 2 or len(array) != num_images or not np.isfinite(array).all():
        raise DataError(
            f"auxiliary: {path} has the shape {array.shape}; expected ({num_images}, width), one "
            "finite row an image, in the order of the samples."
        )
    return torch.from_numpy(array.astype(np.float32))
