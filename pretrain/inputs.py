"""A batch as the model takes it: on the device, with what objectives need and a teacher's view."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.model.attentive import MeanTower
from pretrain.model.clip import ClipModel
from pretrain.objectives import Total
from pretrain.teacher import Teacher

_FIELDS = {  # what an objective `needs`: the field of the batch (PretrainConfig checks the data)
    "views": "view_bv3HW",
    "negative_text": "negative_token_bL",
    "negative_image": "negative_image_b3HW",
}


def forward_inputs(
    batch: Batch,
    total: Total,
    model: ClipModel,
    teacher: Teacher | None,
    mean_tower: MeanTower | None = None,
) -> dict[str, Any]:
    """Return the keywords of ClipModel.forward.

    What the mean tower says is an input: micro-batches are replayed with the same masks.
    """
    device = model.mean.device
    inputs: dict[str, Any] = {
        "image_b3HW": batch.image_b3HW.to(device, non_blocking=True),
        "token_bL": batch.token_bL.to(device),
        "kept_bK": None if batch.kept_bK is None else batch.kept_bK.to(device),
        "kept_text_bK": None if batch.kept_text_bK is None else batch.kept_text_bK.to(device),
    }
    for need in sorted(total.needs & _FIELDS.keys()):
        field = _FIELDS[need]
        inputs[field] = getattr(batch, field).to(device, non_blocking=True)
    if teacher is not None:
        inputs["teacher"] = teacher(model.pixels(inputs["image_b3HW"]), inputs["token_bL"])
    if mean_tower is not None:
        assert batch.view_bv3HW is not None, "refused by the configuration"
        assert batch.view_corner_bv4 is not None
        pixels = model.pixels(inputs["image_b3HW"])
        attended = mean_tower(pixels, batch.view_corner_bv4.to(device, non_blocking=True))
        inputs["view_bv3HW"] = batch.view_bv3HW.to(device, non_blocking=True)
        inputs["kept_view_bvK"] = attended.kept_bvK
        inputs["mean_target_bP"] = attended.target_bP
    return inputs


def micro_batches(batch: Batch, rows: int | None) -> list[Batch]:
    """Cut a local batch into parts of at most `rows` samples, in order; None: the whole is one."""
    size = len(batch.key)
    if rows is None or rows >= size:
        return [batch]

    def part(start: int) -> Batch:
        cut: dict[str, Any] = {
            name: value[start : start + rows]
            for name, value in batch._asdict().items()
            if isinstance(value, Tensor)
        }
        return batch._replace(**cut, key=batch.key[start : start + rows])

    return [part(start) for start in range(0, size, rows)]
