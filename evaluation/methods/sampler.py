"""Which samples are the shots: the sampler of CoOp's code base (Zhou et al., arXiv:2109.01134).

Labels in the order of their first appearance; `random.sample(items of the label, shots)` of one
Python generator, seeded once. Python keeps `random.sample` stable, so the same seeds give the same
samples as the published tables. A class with fewer samples than shots gives all it has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def sample(generator: random.Random, label_n: Sequence[int] | IntArray, shots: int) -> IntArray:
    """Return the positions of `shots` samples a class, class after class."""
    positions: dict[int, list[int]] = {}
    for position, label in enumerate(label_n):
        positions.setdefault(int(label), []).append(position)
    chosen: list[int] = []
    for own in positions.values():
        chosen += generator.sample(own, shots) if len(own) >= shots else own
    return np.asarray(chosen, dtype=np.int64)


def shots_and_validation(
    train_n: IntArray, validation_n: IntArray | None, *, shots: int, validation: int, seed: int
) -> tuple[IntArray, IntArray]:
    """Return positions of the shots in `train_n` and of the validation samples, from one generator.

    Without a validation split (None) the validation samples come from what the shots left over of
    `train_n`, and are positions in it. Where that is less than a quarter of a class (and less than
    `validation`), the last of its shots are validation samples instead: a method that has nothing
    to choose by would take the first of its grid.
    """
    generator = random.Random(seed)
    chosen = sample(generator, train_n, shots)
    if validation_n is not None:
        return chosen, sample(generator, validation_n, validation)
    left = np.setdiff1d(np.arange(len(train_n)), chosen)
    held_out = left[sample(generator, train_n[left], validation)]
    moved: list[int] = []
    for label in np.unique(train_n):
        own = chosen[train_n[chosen] == label]
        wanted = min(validation, max(1, int((train_n == label).sum()) // 4))
        missing = wanted - int((train_n[held_out] == label).sum())
        moved += own[len(own) - min(missing, len(own) - 1) :].tolist() if missing > 0 else []
    is_moved = np.isin(chosen, moved)
    return chosen[~is_moved], np.concatenate([held_out, chosen[is_moved]])


def base_and_new(label_n: IntArray) -> tuple[IntArray, IntArray]:
    """Return the labels of the base classes, the first ceil(C/2), and of the new ones."""
    labels = np.unique(label_n)
    half = -(-len(labels) // 2)
    return labels[:half], labels[half:]
