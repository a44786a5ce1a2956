"""Image-text retrieval, R@K in both directions (Karpathy and Fei-Fei, arXiv:1412.2306).

    t2i R@K   share of texts whose image is among the K nearest images
    i2t R@K   share of images with at least one own caption among the K nearest captions

Legend: n images, m captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from evaluation.dataset import EvaluationDataset
from evaluation.methods.registry import Outcome
from evaluation.ranking import Scores, chance, hits, image_standing, text_standing
from evaluation.statistics import Metric, number
from evaluation.subject import Subject

IntArray = npt.NDArray[np.int64]
CUTOFFS = (1, 5, 10)
_TIES = "tied candidates share the credit"


def recalls(
    scores: Scores, image_of_caption_m: IntArray, cutoffs: Sequence[int] = CUTOFFS
) -> list[Metric]:
    """Return the recalls of scores [n, m], given the position of each caption's image."""
    num_images, num_texts = scores.num_images, scores.num_texts
    image_n = np.arange(num_images)
    text_place = text_standing(scores, image_of_caption_m, image_n)
    image_place = image_standing(scores, image_n, image_of_caption_m)
    one_m = np.ones(num_texts, dtype=np.int64)
    captions_n = np.bincount(image_of_caption_m, minlength=num_images)

    def t2i(k: int) -> Metric:
        definition = f"share of texts whose image is among the {k} nearest images; {_TIES}"
        expected = chance(one_m, num_images, k)
        return Metric(f"t2i_recall@{k}", definition, expected, hits(text_place, k))

    def i2t(k: int) -> Metric:
        definition = f"share of images with an own caption among the {k} nearest captions; {_TIES}"
        expected = chance(captions_n, num_texts, k)
        return Metric(f"i2t_recall@{k}", definition, expected, hits(image_place, k))

    return [*map(t2i, cutoffs), *map(i2t, cutoffs)]


class Retrieval:
    """Retrieval as the suite runs it."""

    name = "retrieval"
    splits: tuple[str, ...] = ("test",)

    def __init__(self, cutoffs: Sequence[int]) -> None:
        self.cutoffs = cutoffs

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs captions."""
        return None if dataset.task == "retrieval" else "the task retrieval (captions)"

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the recalls and, for each cutoff, their mean over both directions."""
        found = recalls(subject.scores(), subject.split().part.image_of_caption_m, self.cutoffs)
        half = len(self.cutoffs)
        means = [
            number(
                f"mean_recall@{k}",
                f"mean of t2i and i2t R@{k}",
                (t2i.value + i2t.value) / 2,
                t2i.num_units + i2t.num_units,
            )
            for k, t2i, i2t in zip(self.cutoffs, found[:half], found[half:], strict=True)
        ]
        yield Outcome([*found, *means], self.name)
