"""What an objective sees of a batch: the local rows of every feature, and the learned scalars.

Features are the towers' raw outputs: the model's similarity embeds them (normalizes, scales, maps),
so that an objective can also take prefixes or projections of them. Half precision is fine.

Legend: b local rows, D embedding width, E the teacher's, P width of a projection head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["teacher", "image_views", "negative_image", "negative_text"]


class Teacher(NamedTuple):
    """A frozen teacher's view of the batch, and the student's features in the teacher's space."""

    image_bE: Tensor  # no gradient
    text_bE: Tensor
    logit_scale: Tensor  # the teacher's exp(s), [1]
    student_image_bE: Tensor  # the student's, projected where the widths differ
    student_text_bE: Tensor
    cross_scale: Tensor  # temperature of student against teacher (CLIP-KD's ICL), learned, [1]


class Features(NamedTuple):
    """The local rows; what a run does not have is None (an objective's `needs` are checked)."""

    image_bD: Tensor
    text_bD: Tensor
    logit_scale: Tensor  # exp(s), [1]
    logit_bias: Tensor | None = None  # [1]
    image_views: tuple[Tensor, Tensor] | None = None  # two augmented views, projected: [b, P] each
    negative_image_bD: Tensor | None = None  # of the negative text (TripletCLIP)
    negative_text_bD: Tensor | None = None  # a hard negative of each text
    teacher: Teacher | None = None
    progress: float = 0.0  # share of the run that is done, for schedules
