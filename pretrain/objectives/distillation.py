"""A student learns from a frozen teacher (CLIP-KD, arXiv:2307.12732; open_clip's distillation).

distill_relation      CRD: the teacher's softmax over the batch against the student's, both ways
distill_feature       FD: the student's features, in the teacher's space, against the teacher's
distill_interaction   ICL: student images against teacher texts, and texts against images

CLIP-KD is [clip, distill_relation, distill_interaction, distill_feature with weight 2000].
The teacher is compared by cosine; its features come with length 1.

Legend: b local pairs, c of a chunk, B of the global batch, D and E widths of student and teacher.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from pretrain.model.features import Features, Need, required
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group

Divergence = Literal["kl", "cross_entropy"]
_TEACHER: frozenset[Need] = frozenset({"teacher"})


def relation_loss(
    features: Features,
    *,
    similarity: Similarity,
    group: Group,
    divergence: Divergence = "kl",
    chunk_rows: int = 512,
) -> Tensor:
    """Return the mean of both directions' KL(teacher || student), or their cross entropy.

    The two differ by the teacher's entropy, a constant: open_clip takes the cross entropy.
    """
    from pretrain.objectives.rows import dot, mean_over_rows

    teacher_image_bE, teacher_text_bE, teacher_scale = required(
        features.teacher_image_bE, features.teacher_text_bE, features.teacher_scale
    )
    image_bD = similarity.embed_image(features.image_bD)
    text_bD = similarity.embed_text(features.text_bD)
    dtype = image_bD.dtype
    teacher_image_bE, teacher_text_bE = teacher_image_bE.to(dtype), teacher_text_bE.to(dtype)
    teacher_scale = teacher_scale.to(dtype)

    def one_way(
        row_bD: Tensor, teacher_row_bE: Tensor, all_BD: Tensor, teacher_BE: Tensor, swap: bool
    ) -> Tensor:
        def summed(
            start: int, row_cD: Tensor, teacher_cE: Tensor, all_BD: Tensor, scale: Tensor
        ) -> Tensor:
            scores = (
                similarity.scores(all_BD, row_cD).T if swap else similarity.scores(row_cD, all_BD)
            )
            log_q = (scale * scores).log_softmax(dim=1)
            log_p = (teacher_scale * dot(teacher_cE, teacher_BE)).log_softmax(dim=1)
            target = log_p - log_q if divergence == "kl" else -log_q
            return (log_p.exp() * target).sum()

        return mean_over_rows(
            summed,
            [row_bD, teacher_row_bE],
            [all_BD, features.logit_scale.to(dtype)],
            chunk_rows=chunk_rows,
            parameters=tuple(similarity.parameters()),
        )

    teacher_image_BE, teacher_text_BE = map(group.gather, (teacher_image_bE, teacher_text_bE))
    image_BD, text_BD = group.gather(image_bD), group.gather(text_bD)
    i2t = one_way(image_bD, teacher_image_bE, text_BD, teacher_text_BE, swap=False)
    t2i = one_way(text_bD, teacher_text_bE, image_BD, teacher_image_BE, swap=True)
    return (i2t + t2i) / 2


def feature_loss(features: Features, *, similarity: Similarity, group: Group) -> Tensor:
    """Return the mean squared errors of image and text features of length 1, added."""
    from torch.nn.functional import mse_loss

    from pretrain.objectives.rows import unit

    image_bE, text_bE = map(unit, required(features.student_image_bE, features.student_text_bE))
    targets = required(features.teacher_image_bE, features.teacher_text_bE)
    teacher_image_bE, teacher_text_bE = (target.to(image_bE.dtype) for target in targets)
    return mse_loss(image_bE, teacher_image_bE) + mse_loss(text_bE, teacher_text_bE)


def interaction_loss(
    features: Features, *, similarity: Similarity, group: Group, chunk_rows: int = 512
) -> Tensor:
    """Return InfoNCE of the student's rows against the teacher's, over both directions.

    The scale is a learned exp(g), as for any temperature; the release takes g itself.
    """
    from pretrain.objectives.rows import dot, softmax_loss, unit

    image_bE, text_bE = map(unit, required(features.student_image_bE, features.student_text_bE))
    teacher_image_bE, teacher_text_bE, cross_scale = required(
        features.teacher_image_bE, features.teacher_text_bE, features.cross_scale
    )
    compare = partial(
        softmax_loss, scale=cross_scale, scores=dot, group=group, chunk_rows=chunk_rows
    )
    i2t = compare(image_bE, group.gather(teacher_text_bE.to(image_bE.dtype)))
    t2i = compare(text_bE, group.gather(teacher_image_bE.to(text_bE.dtype)))
    return (i2t + t2i) / 2


@objectives.register("distill_relation")
def distill_relation(*, divergence: Divergence = "kl", chunk_rows: PositiveInt = 512) -> Objective:
    """Contrastive relations of a teacher (CRD, CLIP-KD, arXiv:2307.12732; open_clip's form)."""
    loss = partial(relation_loss, divergence=divergence, chunk_rows=chunk_rows)
    return Objective(loss, needs=_TEACHER)


@objectives.register("distill_feature")
def distill_feature() -> Objective:
    """Features of a teacher (FD, CLIP-KD, arXiv:2307.12732); its weight there is 2000."""
    return Objective(feature_loss, needs=_TEACHER)


@objectives.register("distill_interaction")
def distill_interaction(*, chunk_rows: PositiveInt = 512) -> Objective:
    """Student against teacher (ICL, CLIP-KD, arXiv:2307.12732)."""
    return Objective(partial(interaction_loss, chunk_rows=chunk_rows), needs=_TEACHER)
