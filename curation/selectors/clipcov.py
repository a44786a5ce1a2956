"""ClipCov: the subset that keeps the cross-covariance of images and texts within each class.

S. Joshi et al., "Data-Efficient Contrastive Language-Image Pretraining: Prioritizing Data Quality
over Quantity" (AISTATS 2024), by the greedy of its released code. Classes are the clusters of a
rule before: for the paper's, give `clusters` the text vectors of class prompts as its centroids.
In a class of n samples with unit vectors x (image) and t (text),

    s_ij     = max(x_i . t_j, 0)
    cross_i  = sum over j of the class (s_ij + s_ji)
    label_i  = max(x_i . l, 0) + max(t_i . l, 0), l the class's prompt (0 without `labels`)
    centre_i = x_i . mean(t) + t_i . mean(x)
    score_i  = cross_i + 2 s_ii + label_i / 2 - centre_i

and the sample of the highest score of all classes is picked until the budget is spent. After every
`block` picks B of a class, each i of it that is left loses

    sum over j of B (s_ij + s_ji) / n  +  mean over B of cross  +  mean over B of label / 2

All that is taken off is >= 0, so the scores at which a class's samples are picked never rise, and
the greedy over all classes is that of each class alone with the picks merged by score: a class is
one task, and the budget is the k highest of all (selection.py). Ties: the smaller uid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from configs.errors import ConfigError, DataError
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules
from curation.global_rules.selection import Bound, Keys, key_of_float, select_smallest
from curation.global_rules.top_fraction import num_wanted
from curation.selectors.clusters import NO_VECTOR, Missing
from curation.selectors.cosines import Float32Array, Float64Array, IntArray, unit
from curation.selectors.files import file_digest, read_centroids
from curation.selectors.groups import (
    Group,
    GroupWork,
    Members,
    MembersOf,
    found,
    work_on_groups,
)
from curation.selectors.in_clusters import InClusters, check_clusters

SCORE, PICK = "score", "pick"
REASON = "not picked"
_FOUND = {SCORE: pa.float64(), PICK: pa.int64()}
_ELEMENTS_AT_ONCE = 1 << 24
# Scores are rounded to this: sums of float32 products know no more, and ties should be ties.
_DECIMALS = 6


def cross_sums(
    image: Float32Array, text: Float32Array, rows: IntArray, columns: IntArray
) -> Float64Array:
    """Return for each i of `rows` the sum over j of `columns` of s_ij + s_ji: [rows]."""
    sums = np.zeros(len(rows))
    step = max(1, _ELEMENTS_AT_ONCE // max(1, len(columns)))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        for a, b in ((image, text), (text, image)):
            cosines = np.maximum(a[some] @ b[columns].T, 0)
            sums[start : start + step] += cosines.sum(axis=1, dtype=np.float64)
    return sums


def greedy(
    image: Float32Array, text: Float32Array, label: Float64Array, block: int
) -> tuple[IntArray, Float64Array]:
    """Return the order in which the samples of a class are picked, and the score of each pick.

    Shapes: image and text [n, D], unit rows, in the order that decides ties; label [n].
    """
    num = len(image)
    everyone = np.arange(num)
    cross = cross_sums(image, text, everyone, everyone)
    own = np.maximum(np.einsum("ij,ij->i", image, text, dtype=np.float64), 0)
    centre = image @ text.mean(axis=0, dtype=np.float64) + text @ image.mean(
        axis=0, dtype=np.float64
    )
    score = cross + 2 * own + label / 2 - centre
    order, at = np.empty(num, np.int64), np.empty(num)
    left = everyone
    for start in range(0, num, block):
        rounded = np.round(score[left], _DECIMALS)
        ranked = np.argsort(-rounded, kind="stable")[:block]
        picked = left[ranked]
        order[start : start + block], at[start : start + block] = picked, rounded[ranked]
        left = np.delete(left, ranked)
        if len(left):
            near = cross_sums(image, text, left, picked) / num
            score[left] -= near + cross[picked].mean() + label[picked].mean() / 2
    return order, at


def labels_of(
    image: Float32Array, text: Float32Array, prompt: npt.NDArray[np.float16] | None
) -> Float64Array:
    """Return label_i of the samples of a class."""
    if prompt is None:
        return np.zeros(len(image))
    line = unit(prompt[None, :])[0].astype(np.float64)
    label: Float64Array = np.maximum(image @ line, 0) + np.maximum(text @ line, 0)
    return label


def pick_class(
    group: Group, argument: tuple[str, str, Path | None, int]
) -> tuple[pa.Table, dict[str, int]]:
    """Return of each sample of a class the score at which it is picked, and which pick it is."""
    images, texts, labels, block = argument
    image, text = unit(group.vectors[images]), unit(group.vectors[texts])
    prompt = None
    if labels:
        row = slice(group.number, group.number + 1)
        prompt = read_centroids(labels, image.shape[1], rows=row)[0]
    order, at = greedy(image, text, labels_of(image, text, prompt), block)
    score, pick = np.empty(len(order)), np.empty(len(order), np.int64)
    score[order], pick[order] = at, np.arange(len(order))
    return group.result(**{SCORE: score, PICK: pick}), {}


@dataclass(frozen=True)
class _Labelled:
    """The members of classes, each of which has its row in a file of labels."""

    members_of: MembersOf
    labels: Path
    num_labels: int

    def __call__(self, part: ShardPart) -> Members:
        members = self.members_of(part)
        largest = int(members.group.max(initial=0))
        if largest >= self.num_labels:
            raise DataError(
                f"{self.labels}: got {self.num_labels:,} rows, and {part.place} has a sample of "
                f"cluster {largest}; expected a row for each cluster, in their order (the file "
                "that `clusters` got as `centroids`)."
            )
        return members


def _keys_of(part: ShardPart, folder: Path) -> Keys:
    table = found(folder, part, _FOUND)
    table = table.filter(table[SCORE].is_valid()).combine_chunks()
    values = table[SCORE].to_numpy(zero_copy_only=False)
    return Keys("", key_of_float(-values), table["uid"].combine_chunks())


class ClipCov:
    """See `clipcov`."""

    def __init__(
        self,
        *,
        images: str,
        texts: str,
        clusters: str,
        labels: Path | None,
        block: int,
        fraction: float | None,
        size: int | None,
        missing: Missing,
    ) -> None:
        self.vectors = frozenset({images, texts})
        self._names, self._clusters, self._labels = (images, texts), clusters, labels
        self._block, self._fraction, self._size = block, fraction, size
        self._missing = missing
        self.emit_digest = f"clipcov {clusters}"

    @property
    def solve_digest(self) -> str:
        """The file by its content; the section says the rest."""
        return file_digest(self._labels)

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return nothing: the clusters stand in the decisions."""
        check_clusters(samples, "clipcov", self._clusters)
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Order each class; find the last of all that are picked."""
        members: MembersOf = InClusters(self._clusters, (), needs=self._names)
        if self._labels:
            num_labels = len(read_centroids(self._labels, None))
            members = _Labelled(members, self._labels, num_labels)
        argument = (*self._names, self._labels, self._block)
        sums = work_on_groups(pool, GroupWork(members, self._names, pick_class, argument))
        num = sums["num_samples"]
        k = num_wanted(num, self._fraction) if self._fraction else min(num, self._size or 0)
        content: dict[str, Any] = {**sums, "num_wanted": k, "bound": None}
        content["num_without_vector"] = pool.num_samples - num
        if num < (self._size or 0):
            content["warnings"] = [f"size {self._size:,}: only {num:,} samples can be picked from"]
        if k:
            keys_of = partial(_keys_of, folder=pool.folder)
            content["bound"] = list(select_smallest(pool, keys_of, {"": num}, {"": k})[""])
        return content

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop what is not picked."""
        table = found(solution.folder, part, _FOUND)
        values = {name: table[name].combine_chunks() for name in _FOUND}
        has_score = values[SCORE].is_valid().to_numpy(zero_copy_only=False)
        goes = has_score.copy()
        bound = solution.values["bound"]
        if bound:
            keys = _keys_of(part, solution.folder)
            goes[has_score] = ~Bound(*bound).holds(keys.keys, keys.uids)
        lacks = ~has_score if self._missing == "drop" else np.zeros(len(goes), np.bool_)
        return Judgement(values, first_reason(len(goes), [(NO_VECTOR, lacks), (REASON, goes)]))


@global_rules.register("clipcov")
def clipcov(
    *,
    images: str,
    texts: str,
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None,
    size: Annotated[int, Field(ge=1)] | None = None,
    labels: Path | None = None,
    clusters: str = "clusters",
    block: Annotated[int, Field(ge=1)] = 200,
    missing: Missing = "drop",
) -> GlobalRule:
    """Keep the subset that preserves the cross-covariance of images and texts in each class.

    A rule `clusters` comes before it: its clusters are the classes. `images` and `texts` are
    vectors of one model. `fraction` of the samples that have both, or `size` of them, stay; one
    budget for all classes. `labels`: an .npy with the text vector of each class in the order of
    the clusters (the file that `clusters` got as `centroids`). Samples without a vector are
    dropped, "no vector" (missing: drop), or stay beside the budget (keep).

    Values: `score`, at which the sample was picked or would have been, and `pick`, its number in
    its class from 0. Time grows with the squares of the classes' sizes.
    """
    if (fraction is None) == (size is None):
        raise ConfigError("clipcov: give either `fraction` or `size`: how much shall stay.")
    return ClipCov(
        images=images,
        texts=texts,
        clusters=clusters,
        labels=labels,
        block=block,
        fraction=fraction,
        size=size,
        missing=missing,
    )
