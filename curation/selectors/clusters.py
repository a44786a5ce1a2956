"""Clusters of the samples by their vectors: spherical k-means once, for the rules that follow.

sample (per shard)  vectors of a subset that a hash has chosen
train  (one task)   k-means on them (kmeans.py), or no training where centroids are given
apply  (per shard)  the nearest centroid of each sample, exactly (cosines.py)
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import Field

from configs import draws
from configs.errors import ConfigError, DataError
from configs.publish import published_file
from curation.filters.base import Judgement, first_reason
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules
from curation.selectors.cosines import nearest
from curation.selectors.files import file_digest, read_centroids, read_file
from curation.selectors.kmeans import check_installed, train
from curation.vectors import has_vector

CLUSTER, SIMILARITY, NUM_TARGETS = "cluster", "similarity", "num_targets"
NO_VECTOR = "no vector"
Missing = Literal["keep", "drop"]
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keywords of the rule (see `clusters`), in a form that travels."""

    vectors: str
    num_clusters: int | None
    centroids: Path | None
    target: Path | None
    train_per_cluster: int
    iterations: int
    missing: Missing


@dataclass(frozen=True)
class _Sample:
    folder: Path
    name: str
    share: float  # of the samples that are trained on; 0: none


def _sample_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:08d}.npy"


def _sample(part: ShardPart, task: _Sample) -> tuple[int, int, int]:
    """Return how many samples have a vector, of which dimension, and how many lie in the file.

    The file: their draws, uids and vectors, as bytes [n, 8 + 16 + 2 dim].
    """
    vectors = part.vectors(task.name)
    if not len(vectors):
        return 0, 0, 0
    is_there = has_vector(vectors)
    uids = part.values("uid")["uid"].to_pylist()
    low, high = draws.uid_words(uids)
    drawn = draws.bits(part.seed, "clusters/train", low, high)
    chosen = np.flatnonzero(is_there & ((drawn >> np.uint64(11)) * 2.0**-53 < task.share))
    path = _sample_path(task.folder, part.number)
    if len(chosen) and not path.exists():
        raw = np.frombuffer(b"".join(uids), np.uint8).reshape(-1, 16)
        columns = [drawn[chosen].astype(">u8").view(np.uint8).reshape(-1, 8), raw[chosen]]
        columns.append(np.ascontiguousarray(vectors[chosen]).view(np.uint8))
        with published_file(path) as file:
            np.save(file, np.concatenate(columns, axis=1), allow_pickle=False)
    return int(is_there.sum()), vectors.shape[1], len(chosen)


@dataclass(frozen=True)
class _Train:
    paths: tuple[Path, ...]
    settings: Settings
    num_wanted: int
    result: Path

    def __str__(self) -> str:
        return f"k-means, {self.settings.num_clusters} clusters"


def _train(task: _Train) -> None:
    if task.result.exists():
        return
    rows = np.concatenate([np.load(path, allow_pickle=False) for path in task.paths])
    keys = np.ascontiguousarray(rows[:, :24]).view("S24")[:, 0]  # as bytes: draw, then uid
    order = np.argsort(keys, kind="stable")[: task.num_wanted]
    vectors = np.ascontiguousarray(rows[order, 24:]).view(np.float16)
    del rows  # before the floats of `train`
    assert task.settings.num_clusters is not None
    found = train(vectors, task.settings.num_clusters, iterations=task.settings.iterations)
    with published_file(task.result) as file:
        np.save(file, found, allow_pickle=False)


@dataclass(frozen=True)
class _Targets:
    target: Path
    centroids: Path
    result: Path

    def __str__(self) -> str:
        return str(self.target)


def _count_targets(task: _Targets) -> tuple[int, int]:
    """Publish how many vectors of the target set are nearest to each centroid.

    Returns the number of its rows, and how many of them are vectors.
    """
    centroids = np.load(task.centroids, allow_pickle=False)
    targets = read_file(task.target, centroids.shape[1])
    counts = np.zeros(len(centroids), np.int64)
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        some = np.asarray(targets[start : start + _ROWS_AT_ONCE], np.float32)
        some = some[has_vector(some)]
        some = some / np.linalg.norm(some, axis=1, keepdims=True)
        counts += np.bincount(nearest(some.astype(np.float16), centroids)[0], minlength=len(counts))
    num = int(counts.sum())
    if not num:
        raise DataError(
            f"{task.target}: none of its {len(targets):,} rows is a vector: all are zero or not "
            "finite. Make the vectors of the target set with `pairmill score`."
        )
    with published_file(task.result) as file:
        np.save(file, counts, allow_pickle=False)
    return len(targets), num


class Clusters:
    """See `clusters`."""

    emit_digest = "clusters"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.vectors = frozenset({settings.vectors})
        self._loaded: tuple[Path, npt.NDArray[np.float16], npt.NDArray[np.int64] | None] | None
        self._loaded = None

    @property
    def solve_digest(self) -> str:
        """The settings, and the files by their content."""
        s = self._settings
        files = (file_digest(s.centroids), file_digest(s.target))
        return repr((s.vectors, s.num_clusters, s.train_per_cluster, s.iterations, *files))

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return nothing: all that is needed are the vectors."""
        return {}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Find the centroids."""
        s = self._settings
        paths, num_with, dim = self._draw(pool)
        result = pool.folder / "centroids.npy"
        if s.centroids or not paths:
            made = read_centroids(s.centroids, dim or None) if s.centroids else np.zeros((0, dim))
            with published_file(result) as file:
                np.save(file, made.astype(np.float16), allow_pickle=False)
        else:
            task = _Train(paths, s, self._num_wanted, result)
            for _ in pool.run(_train, [task], step="k-means", unit="trainings"):
                pass
        centroids = np.load(result, allow_pickle=False)
        content: dict[str, Any] = {
            "num_clusters": len(centroids),
            "dim": dim,
            "num_with_vector": num_with,
            "num_without_vector": pool.num_samples - num_with,
            "centroids_digest": xxhash.xxh3_128_hexdigest(centroids.data),
        }
        said = []
        if len(centroids) < (s.num_clusters or 0):
            said.append(
                f"{len(centroids):,} clusters where {s.num_clusters:,} were asked for: "
                f"{num_with:,} samples have a vector, and equal centroids are one"
            )
        if s.target and len(centroids):
            targets = _Targets(s.target, result, pool.folder / "targets.npy")
            for _, (num_rows, num_targets) in pool.run(
                _count_targets, [targets], step="targets", unit="files"
            ):
                content["num_targets"] = num_targets
                if num_targets < num_rows:
                    said.append(
                        f"{num_rows - num_targets:,} of the {num_rows:,} vectors of the target set "
                        "are zero or not finite, and are not counted"
                    )
        shutil.rmtree(pool.folder / "sample", ignore_errors=True)
        return {**content, "warnings": said} if said else content

    @property
    def _num_wanted(self) -> int:
        """How many samples k-means trains on."""
        s = self._settings
        return 0 if s.centroids else (s.num_clusters or 0) * s.train_per_cluster

    def _draw(self, pool: Pool) -> tuple[tuple[Path, ...], int, int]:
        """Draw the samples to train on: their files, how many of the pool have a vector, and dim.

        The share is that of the pool; where so many lack a vector that too few are found, it is
        that of the samples with one; and then all are taken.
        """
        wanted = self._num_wanted
        aim = wanted + 4 * math.sqrt(wanted)  # to have enough, whatever the hash draws
        num_with, dim, share = pool.num_samples, 0, -1.0
        for turn, enough in enumerate((wanted, self._settings.num_clusters or 0, 0)):
            before, share = share, min(1.0, aim / max(1, num_with)) if turn < 2 else 1.0
            if share == before:
                continue
            folder = pool.folder / "sample" / f"{turn}"
            task = _Sample(folder, self._settings.vectors, share)
            found = dict(pool.map(_sample, task, step="sample"))
            num_with, dim = (
                sum(n for n, _, _ in found.values()),
                max(d for _, d, _ in found.values()),
            )
            if sum(n for _, _, n in found.values()) >= min(enough, num_with):
                break
        numbers = sorted(number for number, (_, _, num) in found.items() if num)
        return tuple(_sample_path(folder, number) for number in numbers), num_with, dim

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Say which cluster each sample lies in; drop who has no vector, if that is wanted."""
        vectors, num = part.vectors(self._settings.vectors), part.num_samples
        centroids, targets = self._files(solution.folder)
        cluster, similarity = np.zeros(num, np.int64), np.zeros(num)
        is_there = has_vector(vectors) if len(vectors) else np.zeros(num, bool)
        if is_there.any() and len(centroids):
            cluster[is_there], similarity[is_there] = nearest(vectors[is_there], centroids)
        values = {
            CLUSTER: pa.array(cluster.astype(np.int32), mask=~is_there),
            SIMILARITY: pa.array(similarity, mask=~is_there),
        }
        if self._settings.target:
            counts = np.zeros(num, np.int64) if targets is None else targets[cluster]
            values[NUM_TARGETS] = pa.array(counts, mask=~is_there)
        drops = ~is_there if self._settings.missing == "drop" else np.zeros(num, bool)
        return Judgement(values, first_reason(num, [(NO_VECTOR, drops)]))

    def _files(self, folder: Path) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64] | None]:
        if self._loaded is None or self._loaded[0] != folder:
            path = folder / "targets.npy"
            targets = np.load(path, allow_pickle=False) if path.exists() else None
            self._loaded = (folder, np.load(folder / "centroids.npy", allow_pickle=False), targets)
        return self._loaded[1:]


@global_rules.register("clusters")
def clusters(
    *,
    vectors: str,
    num_clusters: Annotated[int, Field(ge=1)] | None = None,
    centroids: Path | None = None,
    target: Path | None = None,
    train_per_cluster: Annotated[int, Field(ge=1)] = 64,
    iterations: Annotated[int, Field(ge=1)] = 20,
    missing: Missing = "keep",
) -> GlobalRule:
    """Say of each sample which cluster of its vectors it lies in: a step that later rules use.

    Spherical k-means by faiss on about `num_clusters * train_per_cluster` samples that a hash of
    (seed, uid) chooses, which stand in the memory of one task (6 bytes a number). Or `centroids`,
    an .npy [n, dim]: published ones, or the text vectors of class prompts, which makes the
    clusters a zero-shot classification; a cluster's number is the row. Centroids are unit vectors
    rounded to float16, as the samples' are, and a sample goes to that of the largest cosine, the
    first of equals, exactly.

    Values: `clusters.cluster` (null: no vector), `clusters.similarity` (the cosine), and with
    `target`, an .npy of vectors of a target set, `clusters.num_targets`: how many of those are
    nearest to the same centroid (`image_based` selects by it).

    missing: drop drops samples without a vector, "no vector"; the solution counts them either way.
    """
    if (num_clusters is None) == (centroids is None):
        raise ConfigError(
            "clusters: give either `num_clusters`, to find them, or `centroids`, a file of them."
        )
    if num_clusters is not None:
        check_installed("clusters")
    return Clusters(
        Settings(
            vectors=vectors,
            num_clusters=num_clusters,
            centroids=centroids,
            target=target,
            train_per_cluster=train_per_cluster,
            iterations=iterations,
            missing=missing,
        )
    )
