"""A batch as the model takes it: on the device, with what objectives need and a teacher's view."""

from __future__ import annotations

from typing import Any

from configs.errors import ConfigError
from pretrain.build import Parts
from pretrain.data.loader import Batch

# What an objective `needs`: the batch's fields, and the keys that fill them.
_SOURCES = {
    "views": (("view_bv3HW",), "data.views with two augmentations"),
    "negative_text": (("negative_token_bL",), "data.captions.negative"),
    "negative_image": (("negative_image_b3HW",), "data.negative_image"),
}


def forward_inputs(parts: Parts, batch: Batch) -> dict[str, Any]:
    """Return the keywords of ClipModel.forward. Raises ConfigError where the batch lacks a need."""
    device = parts.engine.device
    inputs: dict[str, Any] = {
        "image_b3HW": batch.image_b3HW.to(device, non_blocking=True),
        "token_bL": batch.token_bL.to(device),
        "kept_bK": None if batch.kept_bK is None else batch.kept_bK.to(device),
    }
    for need in sorted(parts.objective.needs & _SOURCES.keys()):
        fields, key = _SOURCES[need]
        for field in fields:
            tensor = getattr(batch, field)
            if tensor is None or (need == "views" and tensor.shape[1] != 2):
                raise ConfigError(f"the objective needs {need}, which the data lacks: set {key}.")
            inputs[field] = tensor.to(device, non_blocking=True)
    if parts.teacher is not None:
        pixels = parts.engine.model.pixels(inputs["image_b3HW"])
        inputs["teacher"] = parts.teacher(pixels, inputs["token_bL"])
    return inputs
