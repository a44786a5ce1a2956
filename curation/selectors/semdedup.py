"""SemDeDup: of samples of one cluster whose vectors are nearly the same the best one stays.

A. Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic deduplication"
(arXiv:2303.09540). Within a cluster, its samples in the order of the keep policy, sample j goes iff

    M_j = max over i before j of cos(x_i, x_j)  >  max_similarity        (1 - eps in the paper)

One hop: a sample also goes for one that itself goes. So the result is a fact of the vectors and the
policy, in no order. Cosines are compared exactly (cosines.py).
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.ranks import UID_BYTES, Policy
from curation.dedup.rule import DUPLICATE_OF, DUPLICATE_SHARD
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules
from curation.selectors.cosines import Ranked
from curation.selectors.groups import Group, GroupWork, found, work_on_groups
from curation.selectors.in_clusters import (
    ClusterPolicy,
    InClusters,
    check_clusters,
    cut_warnings,
)

SIMILARITY = "similarity"
REASON = "semantic duplicate"
_FOUND = {
    SIMILARITY: pa.float64(),
    DUPLICATE_OF: pa.binary(UID_BYTES),
    DUPLICATE_SHARD: pa.int32(),
}


def find_duplicates(
    group: Group, argument: tuple[str, float, int]
) -> tuple[pa.Table, dict[str, int]]:
    """Return of each sample M_j (null: none is better) and for whom it goes (null: it stays).

    `argument`: name of the vectors, max_similarity, max_cluster. Of several that rank better and
    are above, a sample goes for the best.
    """
    name, threshold, max_cluster = argument
    num = len(group.ranks)
    largest, better = np.full(num, np.nan), np.full(num, -1)
    ranked = Ranked(group.vectors[name], max_compared=max_cluster, each_once=True)
    for block in ranked.blocks():
        largest[block.rows] = ranked.largest(block)
        is_above = ranked.above(block, threshold)
        first = block.columns[is_above.argmax(axis=1)]
        better[block.rows] = np.where(is_above.any(axis=1), first, -1)
    rows = pa.array(better, mask=better < 0)
    uids = pa.array(group.uids, pa.binary(UID_BYTES))
    columns = {
        SIMILARITY: pa.array(largest, mask=np.isnan(largest)),
        DUPLICATE_OF: uids.take(rows),
        DUPLICATE_SHARD: group.shards.take(rows),
    }
    return group.result(**columns), {"num_cut_clusters": int(ranked.is_cut)}


class SemDeDup:
    """See `semdedup`."""

    def __init__(
        self,
        vectors: str,
        clusters: str,
        threshold: float,
        keep: tuple[Policy | ClusterPolicy, ...],
        max_cluster: int,
    ) -> None:
        self.vectors = frozenset({vectors})
        self._name, self._clusters = vectors, clusters
        self._threshold, self._max_cluster = threshold, max_cluster
        self._members = InClusters(clusters, keep, needs=(vectors,))
        self.emit_digest = f"semdedup {clusters}"
        self.solve_digest = ""  # what the section says, no files

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return nothing: the clusters stand in the decisions."""
        check_clusters(samples, "semdedup", self._clusters)
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Compare each sample with the better ones of its cluster."""
        argument = (self._name, self._threshold, self._max_cluster)
        work = GroupWork(self._members, (self._name,), find_duplicates, argument)
        sums = work_on_groups(pool, work)
        said = cut_warnings(sums.get("num_cut_clusters", 0), self._max_cluster)
        return {**sums, "max_similarity": self._threshold, **said}

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop what goes for another."""
        table = found(solution.folder, part, _FOUND)
        values = {name: table[name].combine_chunks() for name in _FOUND}
        goes = values[DUPLICATE_OF].is_valid().to_numpy(zero_copy_only=False)
        return Judgement(values, first_reason(len(goes), [(REASON, goes)]))


@global_rules.register("semdedup")
def semdedup(
    *,
    vectors: str,
    max_similarity: Annotated[float, Field(gt=0, lt=1)],
    clusters: str = "clusters",
    keep: tuple[Policy | ClusterPolicy, ...] = ("hard",),
    max_cluster: Annotated[int, Field(ge=1)] = 100_000,
) -> GlobalRule:
    """Drop a sample iff a better one of its cluster has a cosine above `max_similarity` to it.

    A rule `clusters` comes before it. The better one, by `keep` in order: hard (far from the
    centroid, as in the paper), easy (near it), random (by a draw), resolution, caption_length, key
    (as in `dedup`); then the smallest uid. A sample without a vector is compared with nobody.

    Values: `similarity` (M_j, null for the best of a cluster), `duplicate_of` and
    `duplicate_shard` (for whom it goes: the best that is above). In a cluster with more than
    `max_cluster` different vectors each is compared with that many best; the solution counts such
    clusters.
    """
    return SemDeDup(vectors, clusters, max_similarity, keep, max_cluster)
