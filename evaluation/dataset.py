"""An evaluation dataset: splits of images with labels, captions or groups, and its prompts.

Two forms are read: the folder layout of CLIP_benchmark (layout.py) and a YAML file that says where
everything is (description.py). The order of samples is that of the files. Nothing is decoded here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from evaluation.tar import Span
from evaluation.task import Task

IntArray = npt.NDArray[np.int64]
PLACEHOLDER = "{c}"
NO_ROWS: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class ImageSample:
    """One image of a dataset: its key and where its encoded bytes are."""

    key: str
    image: Span


@dataclass(frozen=True)
class Groups:
    """An attribute: the names of its groups, and each image's group."""

    names: tuple[str, ...]
    index_n: IntArray


@dataclass(frozen=True)
class Prompts:
    """The texts of each class: one a template, or the class's own list."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ()
    per_class: tuple[tuple[str, ...], ...] | None = None

    def of(self, label: int) -> list[str]:
        """Return the prompts of a class. A class name is text, never a format string."""
        if self.per_class is not None:
            return list(self.per_class[label])
        name = self.class_names[label]
        return [template.replace(PLACEHOLDER, name) for template in self.templates]

    @property
    def num_prompts(self) -> int:
        """The number of prompts over all classes."""
        if self.per_class is not None:
            return sum(map(len, self.per_class))
        return len(self.class_names) * len(self.templates)

    @cached_property
    def digest(self) -> str:
        """The sha256 over class names and templates (or each class's prompts), in order."""
        texts = self.templates if self.per_class is None else self.per_class
        prompts = json.dumps([self.class_names, texts], ensure_ascii=False)
        return hashlib.sha256(prompts.encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """One split. What a dataset does not have is None or empty."""

    samples: tuple[ImageSample, ...]
    digest_of: Callable[[], str]
    labels_n: IntArray | None = None
    captions: tuple[str, ...] = ()
    image_of_caption_m: IntArray = field(default_factory=lambda: NO_ROWS)
    groups: Mapping[str, Groups] = field(default_factory=dict)
    distractors: tuple[tuple[str, ...], ...] = ()
    instances: tuple[str, ...] = ()
    images_digest_of: Callable[[], str] | None = None  # None: that of the data

    @cached_property
    def images_digest(self) -> str:
        """The sha256 over the images alone: datasets of the same images share their features."""
        return self.data_digest if self.images_digest_of is None else self.images_digest_of()

    @cached_property
    def data_digest(self) -> str:
        """The sha256 over the files of the split (docs/formats.md, Results)."""
        return self.digest_of()

    def labels(self) -> IntArray:
        """Return the labels [n]; call it where the dataset is known to have them."""
        assert self.labels_n is not None, "a split without labels"
        return self.labels_n

    def without(self, positions: Sequence[int]) -> Self:
        """Return the split without the samples at `positions` and what belongs to them."""
        keep_n = np.setdiff1d(np.arange(len(self.samples)), np.asarray(positions, dtype=np.int64))
        return self.take(keep_n)

    def take(self, keep_n: IntArray) -> Self:
        """Return the samples at `keep_n` (ascending), with their captions."""
        kept_m = np.flatnonzero(np.isin(self.image_of_caption_m, keep_n))
        return replace(
            self,
            samples=tuple(self.samples[i] for i in keep_n),
            labels_n=None if self.labels_n is None else self.labels_n[keep_n],
            captions=tuple(self.captions[i] for i in kept_m),
            image_of_caption_m=np.searchsorted(keep_n, self.image_of_caption_m[kept_m]),
            groups={n: Groups(g.names, g.index_n[keep_n]) for n, g in self.groups.items()},
            distractors=tuple(self.distractors[i] for i in keep_n) if self.distractors else (),
            instances=tuple(self.instances[i] for i in keep_n) if self.instances else (),
        )


@dataclass(frozen=True)
class EvaluationDataset:
    """A dataset: what it is called, what is asked, and its splits, which are read when needed."""

    name: str
    task: Task
    class_names: tuple[str, ...]
    prompts: Prompts | None
    sources: Mapping[str, Callable[[str], Part]]
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.sources)

    def part(self, split: str) -> Part:
        """Return a split. Raises DataError where the dataset does not have it."""
        if split not in self.sources:
            raise DataError(f"{self.name} has no {split} split; it has {', '.join(self.sources)}.")
        if split not in self.parts:
            self.parts[split] = self.sources[split](split)
        return self.parts[split]

    @property
    def test(self) -> Part:
        """The split that is judged."""
        return self.part("test")

    @property
    def prompt_digest(self) -> str | None:
        """The digest of the prompts, None where there are no classes."""
        return None if self.prompts is None else self.prompts.digest
