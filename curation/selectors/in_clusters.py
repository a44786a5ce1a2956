"""Who takes part in a rule that looks within clusters, and in which order they rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from configs import draws
from configs.errors import DataError, UsageError
from curation.dedup.ranks import RANK_COLUMNS, Policy, join_ranks, rank_part
from curation.global_rules.base import ShardPart
from curation.global_rules.selection import key_of_float
from curation.selectors.clusters import CLUSTER, SIMILARITY
from curation.selectors.groups import Members
from curation.vectors import has_vector

# hard: far from the centroid first; easy: near it first (SemDeDup's words); random: by a draw.
ClusterPolicy = Literal["hard", "easy", "random"]
_OWN = ("hard", "easy", "random")


@dataclass(frozen=True)
class InClusters:
    """The samples of a shard with a cluster, and all of some vectors, ranked by `keep`."""

    clusters: str  # label of the rule
    keep: tuple[Policy | ClusterPolicy, ...]
    needs: tuple[str, ...] = ()  # vectors that a sample must have besides

    def __call__(self, part: ShardPart) -> Members:
        """Return the members of a shard."""
        names = {name: f"{self.clusters}.{name}" for name in (CLUSTER, SIMILARITY)}
        values = part.values(*names.values()).rename_columns(list(names))
        takes_part = values[CLUSTER].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
        dims = {}
        for name in self.needs:
            vectors = part.vectors(name)
            dims[name] = vectors.shape[1]
            takes_part = takes_part & (has_vector(vectors) if len(vectors) else False)
        if len(set(dims.values())) > 1:
            (first, dim), *others = dims.items()
            rest = " and ".join(f"{name!r} {other}" for name, other in others)
            raise DataError(
                f"{part.place}: the vectors {first!r} have {dim} dimensions and {rest}; these "
                "must be vectors of one model: score all of them with one."
            )
        rows = np.flatnonzero(takes_part).astype(np.int64)
        values = values.take(pa.array(rows)).combine_chunks()
        samples = part.index(*(RANK_COLUMNS if set(self.keep) - set(_OWN) else ["uid"]))
        samples = samples.take(pa.array(rows)).combine_chunks()
        ranks = join_ranks([_part(p, samples, values, part.seed) for p in self.keep], samples)
        return Members(rows, values[CLUSTER].to_numpy().astype(np.int64), ranks)


def _part(
    policy: Policy | ClusterPolicy, samples: pa.Table, values: pa.Table, seed: int
) -> list[bytes]:
    if policy == "random":
        words = draws.uid_words(samples["uid"].to_pylist())
        keys = draws.bits(seed, "selectors/random", *words)
    elif policy in ("hard", "easy"):
        similarity = values[SIMILARITY].to_numpy()
        keys = key_of_float(similarity if policy == "hard" else -similarity)
    else:
        return rank_part(samples, policy)  # type: ignore[arg-type]
    raw = keys.astype(">u8").tobytes()
    return [raw[at : at + 8] for at in range(0, len(raw), 8)]


def check_clusters(samples: pa.Table, rule: str, clusters: str) -> None:
    """Raise UsageError where no rule `clusters` came before."""
    if f"{clusters}.{CLUSTER}" not in samples.column_names:
        raise UsageError(
            f"{rule}: no rule before it is called {clusters!r}. Put `- {{name: clusters, vectors: "
            f"NAME, num_clusters: N}}` before it, or give `clusters:` the name of the one that is "
            "there (a second one is called clusters_2)."
        )


def cut_warnings(num_cut: int, max_cluster: int) -> dict[str, list[str]]:
    """Return what a solution says of clusters in which not all were compared; else nothing."""
    if not num_cut:
        return {}
    hold = "1 cluster holds" if num_cut == 1 else f"{num_cut:,} clusters hold"
    said = (
        f"{hold} more than {max_cluster:,} samples to compare with (max_cluster), and each is "
        "compared with that many best only: give more clusters, or a larger max_cluster"
    )
    return {"warnings": [said]}
