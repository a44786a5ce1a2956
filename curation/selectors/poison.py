"""Poison detection: samples whose vectors are outliers in a random batch of the pool.

H. Huang et al., "Detecting Backdoor Samples in Contrastive Language Image Pretraining" (ICLR 2025):
the vectors must come from a model that was trained on these very data, since it is the backdoor's
effect on the model that is seen. The scores: outliers.py. Each sample is compared within one batch
that a hash of (seed, uid) puts it into; the larger the batch, the better, and the dearer (n^2), but
poison must be rarer in it than the k neighbours: more than k of a kind are a neighbourhood.
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

from configs import draws
from configs.errors import ConfigError
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules
from curation.global_rules.selection import Bound, Keys, key_of_float, select_smallest
from curation.global_rules.top_fraction import num_wanted
from curation.selectors.clusters import NO_VECTOR, Missing
from curation.selectors.groups import Group, GroupWork, Members, found, work_on_groups
from curation.selectors.outliers import Detector, Estimator, scores
from curation.vectors import has_vector

SCORE = "score"
REASON = "suspicious"
_FOUND = {SCORE: pa.float64()}


@dataclass(frozen=True)
class InBatches:
    """The samples of a shard with a vector, and the batch of each."""

    vectors: str
    num_batches: int

    def __call__(self, part: ShardPart) -> Members:
        """Return the members of a shard."""
        vectors = part.vectors(self.vectors)
        is_there = has_vector(vectors) if len(vectors) else np.zeros(0, np.bool_)
        rows = np.flatnonzero(is_there).astype(np.int64)
        uids = part.values("uid")["uid"].combine_chunks().take(pa.array(rows))
        words = draws.uid_words(uids.to_pylist())
        batch = draws.bits(part.seed, "poison/batch", *words) % np.uint64(self.num_batches)
        return Members(rows, batch.astype(np.int64), uids.cast(pa.binary()))


def _num_with_vector(part: ShardPart, name: str) -> int:
    vectors = part.vectors(name)
    return int(has_vector(vectors).sum()) if len(vectors) else 0


def score_batch(
    group: Group, argument: tuple[str, Detector, int, Estimator]
) -> tuple[pa.Table, dict[str, int]]:
    """Return the score of each sample of a batch; with no k others in it, null."""
    name, detector, k, estimator = argument
    num = len(group.ranks)
    if num <= k:
        return group.result(**{SCORE: pa.nulls(num, pa.float64())}), {"num_unscored": num}
    found_scores = scores(group.vectors[name], detector, k=k, estimator=estimator)
    return group.result(**{SCORE: found_scores}), {"num_unscored": 0}


def _keys_of(part: ShardPart, folder: Path) -> Keys:
    """Return the most suspicious first."""
    table = found(folder, part, _FOUND)
    table = table.filter(table[SCORE].is_valid()).combine_chunks()
    values = table[SCORE].to_numpy(zero_copy_only=False)
    return Keys("", key_of_float(-values), table["uid"].combine_chunks())


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keywords of the rule (see `poison`), in a form that travels."""

    vectors: str
    detector: Detector
    k: int
    estimator: Estimator
    batch_size: int
    remove: float | None
    max_score: float | None
    missing: Missing


class Poison:
    """See `poison`."""

    emit_digest = "poison"
    solve_digest = ""  # what the section says, no files

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.vectors = frozenset({settings.vectors})

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return nothing: all that is needed are the vectors."""
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Score every batch; find the last of the share that goes."""
        s = self._settings
        num_there = sum(n for _, n in pool.map(_num_with_vector, s.vectors, step="count vectors"))
        members = InBatches(s.vectors, max(1, round(num_there / s.batch_size)))
        argument = (s.vectors, s.detector, s.k, s.estimator)
        sums = work_on_groups(pool, GroupWork(members, (s.vectors,), score_batch, argument))
        num_scored = sums["num_samples"] - sums.get("num_unscored", 0)
        content: dict[str, Any] = {
            **sums,
            "num_without_vector": pool.num_samples - sums["num_samples"],
            "num_scored": num_scored,
            "bound": None,
        }
        if num_scored < num_there:
            content["warnings"] = [
                f"{num_there - num_scored:,} of {num_there:,} samples with a vector have no score: "
                f"no more than k = {s.k} others are in their batch. Give a smaller k"
            ]
        k = 0 if s.remove is None else num_wanted(num_scored, s.remove)
        if k:
            keys_of = partial(_keys_of, folder=pool.folder)
            content["bound"] = list(select_smallest(pool, keys_of, {"": num_scored}, {"": k})[""])
        return content

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Drop the suspicious, and, if that is wanted, who has no score."""
        s = self._settings
        column = found(solution.folder, part, _FOUND)[SCORE].combine_chunks()
        has_score = column.is_valid().to_numpy(zero_copy_only=False)
        goes: npt.NDArray[np.bool_] = np.zeros(len(column), np.bool_)
        if s.max_score is not None:
            values = column.fill_null(-np.inf).to_numpy(zero_copy_only=False)
            goes |= values > s.max_score
        bound = solution.values["bound"]
        if bound:
            keys = _keys_of(part, solution.folder)
            goes[has_score] |= Bound(*bound).holds(keys.keys, keys.uids)
        lacks = ~has_score if s.missing == "drop" else np.zeros(len(column), np.bool_)
        reasons = first_reason(len(column), [(NO_VECTOR, lacks), (REASON, goes)])
        return Judgement({SCORE: column}, reasons)


@global_rules.register("poison")
def poison(
    *,
    vectors: str,
    detector: Detector = "dao",
    k: Annotated[int, Field(ge=2)] = 16,
    estimator: Estimator = "mle",
    batch_size: Annotated[int, Field(ge=2)] = 8192,
    remove: Annotated[float, Field(gt=0, lt=1)] | None = None,
    max_score: float | None = None,
    missing: Missing = "keep",
) -> GlobalRule:
    """Drop the samples that look most like poison: a share of them, or those above a score.

    `vectors` are image vectors of a model that was trained on these data. `detector`: kdist, lid,
    slof or dao (outliers.py), over the `k` nearest in a random batch of about `batch_size`;
    `estimator`: of lid and dao. `remove`: floor(remove * n) of the n scored samples go, the highest
    scores, of equals the smaller uid. Without `remove` and `max_score` it only scores.

    Values: `score`, null without a vector (or in a batch of at most k), which missing: drop drops
    as "no vector". Time grows with batch_size: 2 * batch_size * dim operations a sample.
    """
    if batch_size <= 2 * k:
        raise ConfigError(
            f"poison: batch_size {batch_size} is too small for the {k} nearest neighbours; give "
            f"one above {2 * k}, better thousands."
        )
    return Poison(
        Settings(
            vectors=vectors,
            detector=detector,
            k=k,
            estimator=estimator,
            batch_size=batch_size,
            remove=remove,
            max_score=max_score,
            missing=missing,
        )
    )
