"""What an evaluator sees of a model in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pretrain.model.similarity import Similarity
from pretrain.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pretrain.objectives.group import Group


@dataclass(frozen=True)
class ModelView:
    """The model as it is now, in evaluation mode: nothing is masked.

    `encode` takes uint8 images [b, 3, H, W] and token ids [b, L], and returns raw features [b, D]
    (float32, on the device) of both. Under ZeRO stage 3 it is a collective call: every rank makes
    equally many.
    """

    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    image_size: int
    tokenizer: Tokenizer
    similarity: Similarity
    group: Group
    samples_seen: int = 0  # of finished steps
