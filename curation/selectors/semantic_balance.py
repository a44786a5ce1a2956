"""Image-semantic balance: no region of the vectors' space holds more samples than it may.

After "CLIP-CID: Efficient CLIP Distillation via Cluster-Instance Discrimination" (Yang et al.,
arXiv:2408.09441), which clusters LAION-400M by a teacher's image vectors and drops samples that lie
closer to others than thresholds of semantic and of perceptual redundancy (43.7 % of them). Its code
and thresholds are not public; this is the order-free reading of it: at each level (distance, keep)

    sample x goes iff at least `keep` samples of its cluster that rank better lie within `distance`

of x, Euclidean between unit vectors (distance^2 = 2 - 2 cos). One level of keep 1 is SemDeDup; a
narrow one of keep 1 with a wide one of keep 20 leaves one of each picture and 20 of each subject.
`max_per_cluster` then leaves the best of each cluster, by rank among those that no level drops.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from configs.errors import ConfigError
from configs.registry import Config
from curation.dedup.ranks import Policy
from curation.filters.base import Judgement
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules
from curation.selectors.cosines import IntArray, Ranked
from curation.selectors.groups import Group, GroupWork, found, work_on_groups
from curation.selectors.in_clusters import (
    ClusterPolicy,
    InClusters,
    check_clusters,
    cut_warnings,
)

NUM_NEAR = "num_near"
ABOVE_CAP = "above the cap of its cluster"
_LEVEL = "_level"


class Level(Config):
    """Of samples within `distance` (of unit vectors, 0 to 2) of each other `keep` may stay."""

    distance: Annotated[float, Field(gt=0, lt=2)]
    keep: Annotated[int, Field(ge=1)]


def reason_of(level: Level) -> str:
    """Return the reason for drop at a level."""
    return f"{level.keep} within {level.distance:g}"


def count_near(ranked: Ranked, num: int, levels: tuple[Level, ...]) -> IntArray:
    """Return how many better samples lie within each level's distance: [n, levels]."""
    counts = np.zeros((num, len(levels)), np.int64)
    for block in ranked.blocks():
        for at, level in enumerate(levels):
            above = ranked.above(block, 1 - level.distance**2 / 2)
            counts[block.rows, at] = above.sum(axis=1)
    return counts


def balance_cluster(
    group: Group, argument: tuple[str, tuple[Level, ...], int | None, int]
) -> tuple[pa.Table, dict[str, int]]:
    """Return of each sample the counts of its levels, and the level that drops it (null: none)."""
    name, levels, max_per_cluster, max_cluster = argument
    num = len(group.ranks)
    ranked = Ranked(group.vectors[name], max_compared=max_cluster)
    counts = count_near(ranked, num, levels)
    too_many = counts >= np.array([level.keep for level in levels], np.int64)[None, :]
    dropped = np.full(num, -1)
    if levels:
        dropped = np.where(too_many.any(axis=1), too_many.argmax(axis=1), -1)
    if max_per_cluster is not None:
        left = np.flatnonzero(dropped < 0)
        dropped[left[max_per_cluster:]] = len(levels)
    columns = {
        NUM_NEAR: pa.array(counts.tolist(), pa.list_(pa.int32())),
        _LEVEL: pa.array(dropped.astype(np.int8), mask=dropped < 0),
    }
    return group.result(**columns), {"num_cut_clusters": int(ranked.is_cut)}


class SemanticBalance:
    """See `semantic_balance`."""

    def __init__(
        self,
        vectors: str,
        clusters: str,
        levels: tuple[Level, ...],
        max_per_cluster: int | None,
        keep: tuple[Policy | ClusterPolicy, ...],
        max_cluster: int,
    ) -> None:
        self.vectors = frozenset({vectors})
        self._clusters, self._levels = clusters, levels
        self._members = InClusters(clusters, keep, needs=(vectors,))
        self._argument = (vectors, levels, max_per_cluster, max_cluster)
        self.emit_digest = f"semantic_balance {clusters}"
        self.solve_digest = ""  # what the section says, no files

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return nothing: the clusters stand in the decisions."""
        check_clusters(samples, "semantic_balance", self._clusters)
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Count the better samples near each."""
        names = (self._argument[0],)
        work = GroupWork(self._members, names, balance_cluster, self._argument)
        sums = work_on_groups(pool, work)
        return {**sums, **cut_warnings(sums.get("num_cut_clusters", 0), self._argument[3])}

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop what has too many better ones near."""
        types = {NUM_NEAR: pa.list_(pa.int32()), _LEVEL: pa.int8()}
        table = found(solution.folder, part, types)
        texts = [*map(reason_of, self._levels), ABOVE_CAP]
        reasons = pa.array(texts).take(table[_LEVEL].combine_chunks())
        return Judgement({NUM_NEAR: table[NUM_NEAR].combine_chunks()}, reasons)


@global_rules.register("semantic_balance")
def semantic_balance(
    *,
    vectors: str,
    levels: tuple[Level, ...] = (),
    max_per_cluster: Annotated[int, Field(ge=1)] | None = None,
    clusters: str = "clusters",
    keep: tuple[Policy | ClusterPolicy, ...] = ("random",),
    max_cluster: Annotated[int, Field(ge=1)] = 100_000,
) -> GlobalRule:
    """Leave at each of `levels` only `keep` samples within a `distance` of each other.

    A rule `clusters` comes before it. A sample goes iff at least so many better ones of its
    cluster lie within the distance (of unit vectors) of it, counted without regard to whether they
    stay themselves, so that the result is the same in any order; reason: "KEEP within DISTANCE",
    of the first level that drops it. `max_per_cluster` leaves so many best of those that are left
    of each cluster, "above the cap of its cluster". The better one, by `keep`: as in `semdedup`.
    A sample without a vector is compared with nobody, and stays.

    Values: `num_near`, how many better ones lie within each level's distance. In a cluster with
    more than `max_cluster` samples each is compared with that many best.
    """
    if not levels and max_per_cluster is None:
        raise ConfigError("semantic_balance: give `levels`, or `max_per_cluster`, or both.")
    return SemanticBalance(vectors, clusters, levels, max_per_cluster, keep, max_cluster)
