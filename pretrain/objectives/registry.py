"""The contract of an objective and the table of them; one file each beside this one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from configs.registry import Registry
from pretrain.model.clip import Features
from pretrain.model.similarity import Similarity
from pretrain.objectives.group import Group


class Loss(NamedTuple):
    """The mean over the own rows, and what the log shows beside it (fractions of the own rows)."""

    loss: Tensor
    accuracy_i2t: Tensor
    accuracy_t2i: Tensor


class Objective(Protocol):
    """A pure function of local features and the group; formula as in its paper."""

    def __call__(self, features: Features, *, similarity: Similarity, group: Group) -> Loss:
        """Return the mean over the own rows."""
        ...


objectives: Registry[Objective] = Registry("objective")
