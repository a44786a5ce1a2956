"""What an objective sees of a batch: the local rows of every feature, and the learned scalars.

Features are the towers' raw outputs: the model's similarity embeds them (normalizes, scales, maps),
so that an objective can also take prefixes or projections of them. Half precision is fine.

Legend: b local rows, D embedding width, E the teacher's, P width of a projection head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["teacher", "views", "negative_image", "negative_text", "second_image", "mean_target"]


class Features(NamedTuple):
    """The local rows; what a run does not have is None (an objective's `needs` are checked).

    Flat, and every field but `progress` a tensor, with the local rows first or of shape [1].
    """

    image_bD: Tensor
    text_bD: Tensor
    logit_scale: Tensor  # exp(s), [1]
    logit_bias: Tensor | None = None  # [1]
    # Two augmented views of each image, projected.
    view_a_bP: Tensor | None = None
    view_b_bP: Tensor | None = None
    # With attentive masking: `image_bD` is the first view, this the second; BYOL's predictions from
    # the views, and what the mean teacher makes of the crop around them.
    second_image_bD: Tensor | None = None
    online_a_bP: Tensor | None = None
    online_b_bP: Tensor | None = None
    mean_target_bP: Tensor | None = None
    negative_image_bD: Tensor | None = None  # of the negative text (TripletCLIP)
    negative_text_bD: Tensor | None = None  # a hard negative of each text
    # A frozen teacher's features, of length 1, and its exp(s); the student's raw features in the
    # teacher's space; the learned scale of student against teacher (CLIP-KD's ICL).
    teacher_image_bE: Tensor | None = None
    teacher_text_bE: Tensor | None = None
    teacher_scale: Tensor | None = None
    student_image_bE: Tensor | None = None
    student_text_bE: Tensor | None = None
    cross_scale: Tensor | None = None
    progress: float = 0.0  # share of the run that is done, for schedules


def required(*tensors: Tensor | None) -> list[Tensor]:
    """Return fields that the run was checked to have."""
    found = [tensor for tensor in tensors if tensor is not None]
    assert len(found) == len(tensors), "an objective got a batch without what it `needs`"
    return found
