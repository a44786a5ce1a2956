"""Association: which of an instance's images belong to a cue (WinoGAViL, arXiv:2207.12576)?

The k images nearest to the cue are taken, k the number that belongs to it; the score is the Jaccard
index of those taken and those that belong, h / (2 k - h) with h hits. The cue is asked for as
"A cue" or "An cue", in lower case, as DataComp does. Tied images are taken in random order: the
score is the expected one, so that a constant model scores chance.

DataComp's main metric is the mean over instances of 10 and of 12 images.

Legend: k instances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from evaluation.dataset import EvaluationDataset, Part
from evaluation.methods.registry import Outcome
from evaluation.statistics import AnyMetric, Metric
from evaluation.subject import Subject

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
SIZES = {"": (1, 1 << 30), "_5_6": (5, 6), "_10_12": (10, 12)}  # images of an instance
_VOWELS = ("a", "e", "i", "o", "u")


def cue_prompt(cue: str) -> str:
    """Return what the text tower is asked."""
    cue = cue.lower()
    return f"{'An' if cue.startswith(_VOWELS) else 'A'} {cue}"


def jaccard(score_n: FloatArray, belongs_n: BoolArray) -> float:
    """Return the expected Jaccard index of the k highest scores and the k that belong, k > 0."""
    k = int(belongs_n.sum())
    edge = np.sort(score_n)[-k]
    certain = int((belongs_n & (score_n > edge)).sum())
    tied = score_n == edge
    places, right = k - int((score_n > edge).sum()), int((tied & belongs_n).sum())
    wrong = int(tied.sum()) - right
    total = math.comb(right + wrong, places)
    expected = 0.0
    for drawn in range(min(right, places) + 1):
        ways = math.comb(right, drawn) * math.comb(wrong, places - drawn)
        expected += ways / total * (certain + drawn) / (2 * k - certain - drawn)
    return expected


class Association:
    """Association of cues as the suite runs it."""

    name = "association"
    splits: tuple[str, ...] = ("test",)

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs cues and what belongs to them."""
        return None if dataset.task == "association" else "the task association (cues)"

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the mean Jaccard index, of all instances and of those of certain sizes."""
        test, similarity = subject.split(), subject.similarity
        image_nD = similarity.embed_image(test.raw_nD)
        instances = _instances(test.part)
        cues = [cue_prompt(test.part.captions[own[0]]) for own in instances]
        text_kD = similarity.embed_text(subject.features.texts(cues, subject.dataset.name))
        values, levels = [], []
        belongs_n = test.part.labels() == 1
        for own, text_D in zip(instances, text_kD, strict=True):
            score_n = similarity.scores(image_nD[own], text_D[None])[:, 0].double().numpy()
            values.append(jaccard(score_n, belongs_n[own]))
            levels.append(jaccard(np.zeros(len(own)), belongs_n[own]))
        yield Outcome(_metrics(instances, np.asarray(values), np.asarray(levels)), self.name)


def _instances(part: Part) -> list[list[int]]:
    """Return the positions of each instance's images; those without one that belongs are none."""
    found: dict[str, list[int]] = {}
    for position, name in enumerate(part.instances):
        found.setdefault(name, []).append(position)
    labels = part.labels()
    return [own for own in found.values() if (labels[own] == 1).any()]


def _metrics(
    instances: list[list[int]], value_k: FloatArray, chance_k: FloatArray
) -> list[AnyMetric]:
    size_k = np.asarray([len(own) for own in instances])
    metrics: list[AnyMetric] = []
    for suffix, (low, high) in SIZES.items():
        at = np.flatnonzero((size_k >= low) & (size_k <= high))
        if not len(at):
            continue
        said = f" of {low} to {high} images" if suffix else ""
        definition = f"Jaccard index, mean over instances{said}; tied images in random order"
        level = float(chance_k[at].mean())
        metrics.append(Metric(f"jaccard{suffix}", definition, level, value_k[at]))
    return metrics
