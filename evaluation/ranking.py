"""Where the right answer stands among all candidates, by counting; exact under ties.

Scores come in blocks of rows, so that memory is bounded whatever the number of queries.

Ties get their expected credit: the probability of a hit when tied candidates are ordered at random.
So a model whose scores are all equal gets exactly the chance level, and neither the order of
classes nor that of samples changes a result. (By index, as argmax does, differs only where scores
are exactly equal, for example for ImageNet's two pairs of classes with one name.)

Legend: b queries of a block, n queries, m candidates, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.model.similarity import Similarity

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BLOCK_ELEMENTS = 1 << 22  # scores held at once (16 MiB of float32)


class Scores(Protocol):
    """Similarities of images and texts, by rows. Higher is nearer."""

    num_images: int
    num_texts: int

    def image_rows(self, start: int, stop: int) -> Tensor:
        """Return the scores of images start..stop against every text [b, num_texts]."""
        ...

    def text_rows(self, start: int, stop: int) -> Tensor:
        """Return the scores of texts start..stop against every image [b, num_images]."""
        ...


class FeatureScores:
    """Scores of embedded features under the model's similarity.

    Equal candidates are scored once: a matrix product may round two equal columns differently, and
    what is tied must stay tied.
    """

    def __init__(self, image_nD: Tensor, text_mD: Tensor, similarity: Similarity) -> None:
        self.num_images = len(image_nD)
        self.num_texts = len(text_mD)
        self._image_nD = image_nD
        self._text_mD = text_mD
        self._similarity = similarity

    @cached_property
    def _unique_images(self) -> tuple[Tensor, Tensor]:
        return _unique_rows(self._image_nD)

    @cached_property
    def _unique_texts(self) -> tuple[Tensor, Tensor]:
        return _unique_rows(self._text_mD)

    def image_rows(self, start: int, stop: int) -> Tensor:
        """Return the scores of images start..stop against every text [b, num_texts]."""
        unique, inverse_m = self._unique_texts
        return self._similarity.scores(self._image_nD[start:stop], unique)[:, inverse_m]

    def text_rows(self, start: int, stop: int) -> Tensor:
        """Return the scores of texts start..stop against every image [b, num_images]."""
        unique, inverse_n = self._unique_images
        return self._similarity.scores(unique, self._text_mD[start:stop]).T[:, inverse_n]


def _unique_rows(features_mD: Tensor) -> tuple[Tensor, Tensor]:
    unique, inverse_m = torch.unique(features_mD, dim=0, return_inverse=True)
    return unique, inverse_m


class Standing(NamedTuple):
    """For each query: how many candidates score above its best right one, and how many equal it."""

    num_above_n: IntArray
    num_tied_n: IntArray  # the best right one included
    num_right_tied_n: IntArray
    num_candidates: int


def blocks(num_queries: int, num_candidates: int) -> Iterator[tuple[int, int]]:
    """Cut the queries into blocks of at most BLOCK_ELEMENTS scores."""
    size = max(1, BLOCK_ELEMENTS // max(1, num_candidates))
    for start in range(0, num_queries, size):
        yield start, min(start + size, num_queries)


def standing(scores_bm: Tensor, query_b: Tensor, candidate_m: Tensor) -> Standing:
    """Count for queries and candidates with identities; a candidate is right where they are equal.

    Every query must have a right candidate.
    """
    right_bm = query_b[:, None] == candidate_m[None, :]
    assert bool(right_bm.any(dim=1).all()), "a query without a right candidate"
    best_b = scores_bm.masked_fill(~right_bm, -torch.inf).amax(dim=1, keepdim=True)
    tied_bm = scores_bm == best_b
    counts = (scores_bm > best_b, tied_bm, tied_bm & right_bm)
    above, tied, right_tied = (mask.sum(dim=1).numpy() for mask in counts)
    return Standing(above, tied, right_tied, len(candidate_m))


def image_standing(scores: Scores, image_id_n: IntArray, text_id_m: IntArray) -> Standing:
    """Rank all texts for each image."""
    return _standing_in_blocks(scores.image_rows, image_id_n, text_id_m)


def text_standing(scores: Scores, text_id_m: IntArray, image_id_n: IntArray) -> Standing:
    """Rank all images for each text."""
    return _standing_in_blocks(scores.text_rows, text_id_m, image_id_n)


def _standing_in_blocks(
    rows: Callable[[int, int], Tensor], query_n: IntArray, candidate_m: IntArray
) -> Standing:
    # One array for all blocks: small results kept from each would cut up the memory that its scores
    # leave behind, so that the next block's did not fit there.
    count_3n = np.empty((3, len(query_n)), dtype=np.int64)
    query, candidate = torch.from_numpy(query_n), torch.from_numpy(candidate_m)
    for start, stop in blocks(len(query_n), len(candidate_m)):
        count_3n[:, start:stop] = standing(rows(start, stop), query[start:stop], candidate)[:3]
    above_n, tied_n, right_tied_n = count_3n
    return Standing(above_n, tied_n, right_tied_n, len(candidate_m))


def hits(place: Standing, k: int) -> FloatArray:
    """Return for each query the probability that a right candidate is among the first k.

    With a above, t tied of which r right, and s = k - a places left for the tied:
    1 - C(t - r, s) / C(t, s), which is 0 or 1 where there are no ties.
    """
    num_wrong_n = (place.num_tied_n - place.num_right_tied_n).astype(np.float64)
    num_places_n = k - place.num_above_n
    miss_n = np.ones(len(num_wrong_n))
    for drawn in range(k):
        left_n = place.num_tied_n - drawn
        step_n = np.clip((num_wrong_n - drawn) / np.maximum(left_n, 1), 0, 1)
        miss_n *= np.where(drawn < num_places_n, step_n, 1)
    return 1 - miss_n


def chance(num_right_n: IntArray, num_candidates: int, k: int) -> float:
    """Return the expected mean of hits under a random order: all candidates tied."""
    num_queries = len(num_right_n)
    above_n = np.zeros(num_queries, dtype=np.int64)
    tied_n = np.full(num_queries, num_candidates, dtype=np.int64)
    return float(hits(Standing(above_n, tied_n, num_right_n, num_candidates), k).mean())
