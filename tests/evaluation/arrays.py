"""A checkpoint whose features are given arrays: for methods, which see features only."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch

from evaluation.dataset import EvaluationDataset, Groups, ImageSample, Part, Prompts
from evaluation.subject import Subject
from evaluation.tar import Span
from pretrain.model.geometries import Cosine

SIZES = {"train": 240, "val": 90, "test": 150}


class ArrayFeatures:
    """Features by split, and of texts by a hash of the text."""

    def __init__(
        self, images: Mapping[str, torch.Tensor], texts: Mapping[str, torch.Tensor]
    ) -> None:
        self.by_split = images
        self.by_text = texts
        self.identity = SimpleNamespace(similarity=Cosine(), checkpoint="arrays", digest="d")

    def images(self, name: str, split: str, part: Part) -> tuple[torch.Tensor, Part]:
        return self.by_split[f"{name}/{split}"], part

    def texts(self, texts: list[str], what: str) -> torch.Tensor:
        return torch.stack([self.by_text[text] for text in texts])

    def logit_scale(self) -> float:
        return 20.0


def make_subject(
    *, seed: int = 0, num_classes: int = 6, width: int = 24, test_labels: np.ndarray | None = None
) -> Subject:
    """Return noisy clusters around classes whose texts are off by a shift, and an OOD set."""
    draw = np.random.default_rng(seed)
    center = draw.normal(size=(num_classes, width))
    names = tuple(f"class {i}" for i in range(num_classes))
    texts = {
        n: torch.from_numpy(c + 1.1 * draw.normal(size=width)).float()
        for n, c in zip(names, center, strict=True)
    }
    images, parts = {}, {}
    for split, n in SIZES.items():
        label_n = np.arange(n) % num_classes
        noise = draw.normal(size=(n, width)) * 1.3
        images[f"set/{split}"] = torch.from_numpy(center[label_n] + noise).float()
        labels_n = test_labels if split == "test" and test_labels is not None else label_n
        samples = tuple(ImageSample(f"{i}", Span(None, 0, 0)) for i in range(n))  # type: ignore[arg-type]
        captions = tuple(names[i] for i in label_n)
        groups = {"tone": Groups(("dark", "light"), (np.arange(n) // 7) % 2)}
        parts[split] = Part(samples, lambda: "x", labels_n, captions, np.arange(n), groups)
    images["other/test"] = torch.from_numpy(draw.normal(size=(80, width))).float()
    features = ArrayFeatures(
        images, {**texts, **{f"A photo depicts {n}": t for n, t in texts.items()}}
    )
    dataset = EvaluationDataset(
        "set",
        "zero_shot",
        names,
        Prompts(names, templates=("{c}",)),
        dict.fromkeys(SIZES, parts.get),
        parts,
    )
    other_part = Part(parts["test"].samples[:80], lambda: "y", np.zeros(80, dtype=np.int64))
    other = EvaluationDataset(
        "other", "zero_shot", names, None, {"test": lambda _: other_part}, {"test": other_part}
    )
    return Subject(features, dataset, {"set": dataset, "other": other}, seed=0)  # type: ignore[arg-type]
