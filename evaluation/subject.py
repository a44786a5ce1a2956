"""What a method sees: one checkpoint on one dataset, features computed when they are asked for.

Legend: n images, m texts, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from evaluation.dataset import EvaluationDataset, Part
from evaluation.features import Features
from evaluation.methods.few_shot import Labelled
from evaluation.ranking import FeatureScores
from pretrain.model.similarity import Similarity


@dataclass
class Split:
    """The raw image features of a split [n, D] and what else is known of it."""

    raw_nD: Tensor
    part: Part

    @property
    def label_n(self) -> Tensor:
        """The labels as a tensor."""
        return torch.from_numpy(self.part.labels())


@dataclass
class Subject:
    """One checkpoint on one dataset."""

    features: Features
    dataset: EvaluationDataset
    datasets: Mapping[str, EvaluationDataset]  # of the whole run, for methods that need another
    seed: int = 0
    logit_scale: float | None = None  # None: the model's own
    _splits: dict[str, Split] = field(default_factory=dict)

    @property
    def similarity(self) -> Similarity:
        """The geometry of the checkpoint."""
        return self.features.identity.similarity

    @cached_property
    def scale(self) -> float:
        """What similarities are multiplied by to be logits."""
        return self.features.logit_scale() if self.logit_scale is None else self.logit_scale

    def split(self, name: str = "test") -> Split:
        """Return a split with its features, less the images that cannot be decoded."""
        if name not in self._splits:
            part = self.dataset.part(name)
            self._splits[name] = Split(*self.features.images(self.dataset.name, name, part))
        return self._splits[name]

    def prompt_features(self) -> list[Tensor]:
        """Return the raw features of each class's prompts, C x [T, D]."""
        prompts = self.dataset.prompts
        assert prompts is not None, "a dataset without classes"
        texts = [prompts.of(label) for label in range(len(self.dataset.class_names))]
        flat = [text for own in texts for text in own]
        feature_mD = self.features.texts(flat, self.dataset.name)
        return list(torch.split(feature_mD, [len(own) for own in texts]))

    @cached_property
    def class_vectors(self) -> Tensor:
        """One embedded vector a class: the model's similarity combines the prompts of a class."""
        parts = self.prompt_features()
        if len({len(part) for part in parts}) == 1:
            return self.similarity.class_vectors(torch.stack(parts))
        return torch.cat([self.similarity.class_vectors(part[None]) for part in parts])

    def caption_features(self, part: Part) -> Tensor:
        """Return the embedded captions of a split [m, D]."""
        raw_mD = self.features.texts(part.captions, self.dataset.name)
        return self.similarity.embed_text(raw_mD)

    def scores(self) -> FeatureScores:
        """Return the scores of test images against classes, or captions."""
        test = self.split()
        image_nD = self.similarity.embed_image(test.raw_nD)
        text_mD = self.class_vectors if self.dataset.prompts else self.caption_features(test.part)
        return FeatureScores(image_nD, text_mD, self.similarity)

    def labelled(self, split: str, *, aux_nA: Tensor | None = None) -> Labelled:
        """Return a split with labels and zero-shot logits."""
        data = self.split(split)
        image_nD = self.similarity.embed_image(data.raw_nD)
        logit_nC = self.logits(image_nD)
        return Labelled(data.raw_nD, image_nD, data.label_n, logit_nC, aux_nA)

    def logits(self, image_nD: Tensor) -> Tensor:
        """Return zero-shot logits [n, C] of embedded images."""
        return self.scale * self.similarity.scores(image_nD, self.class_vectors)

    @cached_property
    def test_logits(self) -> Tensor:
        """Zero-shot logits of the test images [n, C]."""
        return self.logits(self.similarity.embed_image(self.split().raw_nD))

    def partner(self, name: str) -> Subject:
        """Return the same checkpoint on another dataset of the run."""
        return Subject(
            self.features, self.datasets[name], self.datasets, self.seed, self.logit_scale
        )


def has_labels(dataset: EvaluationDataset) -> str | None:
    """Say that the dataset has no labels, None where it has."""
    if dataset.task != "zero_shot" or not dataset.class_names:
        return "classes and labels"
    return None


def needs(dataset: EvaluationDataset, *splits: str) -> str | None:
    """Say what of labels and these splits a dataset lacks; None where it has all."""
    missing = [split for split in splits if split not in dataset.splits]
    return has_labels(dataset) or (f"a {' and a '.join(missing)} split" if missing else None)


def held_out(label_n: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut rows into a part to fit on and a held-out share, by hash; both as ascending positions."""
    from configs import draws

    draw = draws.uniform(seed, "evaluation/held out", np.arange(len(label_n)))
    is_out = torch.from_numpy(draw < share)
    return torch.nonzero(~is_out)[:, 0], torch.nonzero(is_out)[:, 0]
