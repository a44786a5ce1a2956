"""Worst-group accuracy: the accuracy within each group, the lowest of them, and the gap.

A group is a pair (label, attribute) or an attribute alone; a group without an image does not count
(perceptionCLIP's code gives it 0). Waterbirds papers weigh the average by the groups' training
frequency: `adjusted_average` does, where the dataset has a train split.

Legend: n images, G groups, b resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from evaluation.dataset import EvaluationDataset, Part
from evaluation.methods.registry import Outcome
from evaluation.methods.zero_shot import accuracies
from evaluation.statistics import AnyMetric, Statistic, number
from evaluation.subject import Subject, has_labels

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def group_accuracies(
    correct_n: FloatArray, group_n: IntArray, num_groups: int, count_bn: FloatArray
) -> FloatArray:
    """Return the accuracy of each group [b, G] for counts of images [b, n]; NaN where empty."""
    member_nG = np.zeros((len(group_n), num_groups))
    member_nG[np.arange(len(group_n)), group_n] = 1
    size_bG = count_bn @ member_nG
    hits_bG = count_bn @ (member_nG * correct_n[:, None])
    with np.errstate(invalid="ignore"):
        share: FloatArray = np.where(size_bG > 0, hits_bG / size_bG, np.nan)
    return share


def adjusted_average(accuracy_G: FloatArray, train_count_G: FloatArray) -> float:
    """Return the mean of the groups' accuracies, weighted by their frequency in training."""
    known = ~np.isnan(accuracy_G) & (train_count_G > 0)
    return float(np.average(accuracy_G[known], weights=train_count_G[known]))


class WorstGroup:
    """Zero-shot accuracy by group as the suite runs it."""

    name = "worst_group"
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(
        self, attribute: str, with_label: bool, top: int, leave_out: Sequence[str]
    ) -> None:
        self.attribute = attribute
        self.with_label = with_label
        self.top = top
        self.leave_out = frozenset(leave_out)

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """It needs labels and the attribute."""
        if has_labels(dataset):
            return has_labels(dataset)
        if self.top > len(dataset.class_names):
            return f"at least {self.top} classes, for top{self.top}"
        return None if self.attribute in dataset.test.groups else f"the group {self.attribute!r}"

    def _groups(self, part: Part) -> tuple[list[str], IntArray]:
        """Return each kept image's group by name, and the kept positions.

        By name: the same group may have another number in another split.
        """
        groups = part.groups[self.attribute]
        own = [groups.names[i] for i in groups.index_n]
        kept_n = np.flatnonzero([name not in self.leave_out for name in own])
        if not self.with_label:
            return [own[i] for i in kept_n], kept_n
        label_n = part.labels()
        return [f"{label_n[i]}/{own[i]}" for i in kept_n], kept_n

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Return the worst group's accuracy, the average, their gap, and each group's accuracy."""
        part = subject.split().part
        own, kept_n = self._groups(part)
        names, group_n = np.unique(own, return_inverse=True)
        metrics = accuracies(subject.scores(), part.labels(), len(subject.dataset.class_names))
        wanted = next(m for m in metrics if m.name == f"top{self.top}")
        correct_n = wanted.values_n[kept_n]

        def by_group(count_bn: FloatArray) -> FloatArray:
            return group_accuracies(correct_n, group_n, len(names), count_bn)

        def average(count_bn: FloatArray) -> FloatArray:
            mean: FloatArray = count_bn @ correct_n / count_bn.sum(axis=1)
            return mean

        def worst(count_bn: FloatArray) -> FloatArray:
            lowest: FloatArray = np.nanmin(by_group(count_bn), axis=1)
            return lowest

        what = f"{wanted.name} by {self.attribute}{' and label' if self.with_label else ''}"
        n = len(kept_n)
        found: list[AnyMetric] = [
            Statistic(
                "worst_group",
                f"{what}: the lowest; empty groups left out",
                None,
                n,
                worst,
                strata_n=group_n,
                is_shifted=True,
            ),
            Statistic("average", f"{what}: over all images", wanted.chance, n, average),
            Statistic(
                "group_gap",
                f"{what}: average less lowest",
                None,
                n,
                lambda count: average(count) - worst(count),
                strata_n=group_n,
                is_shifted=True,
            ),
        ]
        accuracy_G = by_group(np.ones((1, n)))[0]
        if "train" in subject.dataset.splits:
            in_train = Counter(self._groups(subject.dataset.part("train"))[0])
            count_G = np.asarray([in_train[name] for name in names], dtype=np.float64)
            value = adjusted_average(accuracy_G, count_G)
            said = f"{what}: weighted by the groups' share of train"
            found.append(number("adjusted_average", said, value, n))
        sizes = np.bincount(group_n, minlength=len(names))
        rows = [[str(names[g]), float(accuracy_G[g]), int(sizes[g])] for g in range(len(names))]
        yield Outcome(found, self.name, shown={"groups": rows})
