"""The methods by name, and what one gives. catalogue.py registers them.

A method is configured by its `name` and keywords; it says why it cannot run on a dataset, or runs
on the features of one checkpoint on that dataset (subject.py) and gives metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from configs.registry import Registry

if TYPE_CHECKING:
    from evaluation.dataset import EvaluationDataset
    from evaluation.methods.few_shot import FewShotTask, Fitted, Labelled
    from evaluation.statistics import AnyMetric
    from evaluation.subject import Subject

Compat = Literal["none", "published"]
Uncertainty = Literal["moment", "none", "entropy", "energy", "max", "max-min", "top5", "var"]
CSearch = Literal["openai", "coop"]
FprDefinition = Literal["vim", "knn_ood", "mcm", "clipn"]


@dataclass(frozen=True)
class Outcome:
    """Metrics that were computed in one go, and the choices that belong to them."""

    metrics: Sequence[AnyMetric]
    method: str  # as the rows name it
    shots: int | None = None
    seeds: tuple[int, ...] = ()
    chosen: dict[str, Any] = field(default_factory=dict)  # hyperparameters, by seed where several
    compat: Compat = "none"
    prompt_digest: str | None = None  # where it is not the dataset's
    shown: dict[str, Any] = field(default_factory=dict)  # curves and matrices for the report


class Method(Protocol):
    """A method of the suite."""

    name: str
    splits: tuple[str, ...]  # that it reads, where the dataset has them

    def lacks(self, dataset: EvaluationDataset) -> str | None:
        """Say what the dataset lacks for this method; None where it can run."""
        ...

    def run(self, subject: Subject) -> Iterator[Outcome]:
        """Run on one checkpoint's features of one dataset."""
        ...


class Learner(Protocol):
    """A few-shot method on cached features."""

    name: str

    def fit(self, task: FewShotTask, validation: Labelled) -> Fitted:
        """Learn from the shots; choose on validation only."""
        ...

    def fit_published(self, task: FewShotTask, validation: Labelled, test: Labelled) -> Fitted:
        """Follow the authors' protocol, which may choose on test labels."""
        ...


methods: Registry[Method] = Registry("method")
learners: Registry[Learner] = Registry("few-shot method")
