"""The contract of an objective and the table of them; one file each beside this one.

No torch here: a configuration is read, and checked, without it. An objective's file imports torch
inside its functions for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from pydantic import PositiveFloat, PositiveInt

from configs.registry import Registry, Variant
from pretrain.model.features import Features, Need
from pretrain.model.logits import Logits

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.similarity import Similarity
    from pretrain.objectives.group import Group


class LossFunction(Protocol):
    """A pure function of local features and the group; formula as in its paper."""

    def __call__(self, features: Features, *, similarity: Similarity, group: Group) -> Tensor:
        """Return the mean over the own rows, a scalar."""
        ...


@dataclass(frozen=True)
class Objective:
    """A loss, and what a run must have for it."""

    loss: LossFunction
    needs: frozenset[Need] = frozenset()  # features beside image and text
    geometries: tuple[str, ...] = ()  # names of the similarities it is defined in; empty: all
    logits: Logits | None = None  # where its paper starts scale and bias


class Term(Variant):
    """One objective of a run, times its weight."""

    common: ClassVar[frozenset[str]] = frozenset({"name", "weight", "matryoshka"})

    weight: PositiveFloat = 1.0
    # Matryoshka (arXiv:2205.13147): the sum of the objective over these first dimensions.
    matryoshka: tuple[PositiveInt, ...] = ()


objectives: Registry[Objective] = Registry("objective", base=Term)


class Loss(NamedTuple):
    """What is minimised, and its terms by name, before their weights; all are scalars."""

    loss: Tensor
    terms: dict[str, Tensor]


class Total:
    """The weighted sum of a run's objectives."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = [(term, term.build()) for term in terms]

    @property
    def needs(self) -> frozenset[Need]:
        """Features beside image and text that any of the terms needs."""
        return frozenset().union(*(objective.needs for _, objective in self.terms))

    @property
    def logits(self) -> Logits | None:
        """Where the first term that cares starts scale and bias."""
        wanted = (objective.logits for _, objective in self.terms)
        return next((logits for logits in wanted if logits is not None), None)

    def __call__(self, features: Features, *, similarity: Similarity, group: Group) -> Loss:
        """Return the weighted sum, a mean over the own rows."""
        found: dict[str, Tensor] = {}
        losses = []
        for term, objective in self.terms:
            parts = [
                objective.loss(prefix(features, size), similarity=similarity, group=group)
                for size in term.matryoshka or (None,)
            ]
            loss = parts[0] if len(parts) == 1 else sum(parts[1:], start=parts[0])
            losses.append(term.weight * loss)
            name, number = term.name, 2
            while name in found:
                name, number = f"{term.name}_{number}", number + 1
            found[name] = loss
        return Loss(sum(losses[1:], start=losses[0]), found)


def prefix(features: Features, size: int | None) -> Features:
    """Return the features with only the first `size` dimensions of the embedding space."""
    if size is None:
        return features
    others = (features.negative_image_bD, features.negative_text_bD, features.second_image_bD)
    negative_image, negative_text, second = (None if f is None else f[:, :size] for f in others)
    return features._replace(
        image_bD=features.image_bD[:, :size],
        text_bD=features.text_bD[:, :size],
        negative_image_bD=negative_image,
        negative_text_bD=negative_text,
        second_image_bD=second,
    )
