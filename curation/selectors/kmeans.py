"""Spherical k-means: faiss trains it on a subset that a hash has chosen (cosines.py assigns).

J. Johnson, M. Douze and H. Jegou, "Billion-scale similarity search with GPUs" (arXiv:1702.08734);
faiss is what SemDeDup and DataComp cluster with. The subset comes sorted by its draws, and the
first centroids are its first vectors, so that the result depends on no order of shards or workers;
one thread, so that it depends on no number of cores either.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UsageError
from curation.selectors.cosines import unit


def check_installed(rule: str) -> None:
    """Raise UsageError where faiss is not installed; it is not imported."""
    if importlib.util.find_spec("faiss") is None:
        raise UsageError(
            f"{rule}: k-means needs faiss, which is not installed here. Install it with `pip "
            "install 'pairmill[vectors]'` on every node, or give `centroids:`, a file of them."
        )


def train(vectors: npt.NDArray[Any], num_clusters: int, *, iterations: int) -> npt.NDArray[Any]:
    """Return the centroids of `vectors` [n, D] as unit float16 rows [min(num_clusters, n), D].

    Centroids that are equal to the last bit stand once.
    """
    import faiss

    units = unit(vectors)
    num_clusters = min(num_clusters, len(units))
    first = np.ascontiguousarray(units[:num_clusters])
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(
        units.shape[1],
        num_clusters,
        niter=iterations,
        spherical=True,
        seed=1234,  # of the splits of empty clusters; the first centroids are given
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, -(-len(units) // num_clusters)),  # all of the subset
    )
    kmeans.train(units, init_centroids=first)
    assert kmeans.centroids is not None
    return as_centroids(kmeans.centroids)


def as_centroids(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Return unit float16 rows; of equal ones the first stays, and zero or NaN has no place."""
    is_there = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    rounded = unit(vectors[is_there]).astype(np.float16)
    _, at = np.unique(rounded, axis=0, return_index=True)
    centroids: npt.NDArray[np.float16] = rounded[np.sort(at)]
    return centroids
