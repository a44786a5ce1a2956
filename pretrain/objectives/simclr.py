"""SimCLR between two augmented views of each image (arXiv:2002.05709), SLIP's side loss
(arXiv:2112.12750): put `clip` before it for SLIP. Costs two more image encodings a sample.

With a, b the projections of the views, normalized, and t the temperature, the row of a_i is
[a_i b_j / t over j | a_i a_j / t over j != i], the right one a_i b_i; L = [CE(a) + CE(b)] / 2.

Legend: b local images, B of the global batch, P width of the projection.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from pretrain.model.features import Features, required
from pretrain.objectives.registry import Objective, objectives

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group


def simclr_loss(
    features: Features,
    *,
    similarity: Similarity,
    group: Group,
    temperature: float = 0.1,
    chunk_rows: int = 512,
) -> Tensor:
    """Return SimCLR's loss of the two views; the geometry of the model has no part in it."""
    import torch

    from pretrain.objectives.rows import mean_over_rows, own_places, unit

    a_bP, b_bP = map(unit, required(features.view_a_bP, features.view_b_bP))

    def summed(start: int, row_cP: Tensor, other_BP: Tensor, same_BP: Tensor) -> Tensor:
        own_c = own_places(group, len(a_bP), start, row_cP)
        same_cB = (row_cP @ same_BP.T).scatter(1, own_c[:, None], float("-inf"))
        logits = torch.cat([row_cP @ other_BP.T, same_cB], dim=1) / temperature
        return torch.nn.functional.cross_entropy(logits, own_c, reduction="sum")

    a_BP, b_BP = group.gather(a_bP), group.gather(b_bP)
    loss_a = mean_over_rows(summed, [a_bP], [b_BP, a_BP], chunk_rows=chunk_rows)
    loss_b = mean_over_rows(summed, [b_bP], [a_BP, b_BP], chunk_rows=chunk_rows)
    return (loss_a + loss_b) / 2


@objectives.register("simclr")
def simclr(*, temperature: PositiveFloat = 0.1, chunk_rows: PositiveInt = 512) -> Objective:
    """SimCLR on two augmented views of each image (SLIP, arXiv:2112.12750)."""
    return Objective(
        partial(simclr_loss, temperature=temperature, chunk_rows=chunk_rows),
        needs=frozenset({"views"}),
    )
