"""Evaluation datasets in the folder layout of CLIP_benchmark and DataComp (docs/formats.md).

    classnames.txt  zeroshot_classification_templates.txt  [dataset_type.txt]
    test/nshards.txt  test/0.tar  test/1.tar ...

The order of samples is the order in the tars, tar after tar: results never depend on how images are
read. Nothing is decoded here; see images.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from evaluation.config import DatasetConfig, Task
from evaluation.tar import IMAGE_EXTENSIONS, Span, TarSample, digest_files, scan_tar

IntArray = npt.NDArray[np.int64]
PLACEHOLDER = "{c}"
MAX_TARS = 100_000
_MAX_DIGITS = 9


@dataclass(frozen=True)
class ImageSample:
    """One image of a dataset: its key and where its encoded bytes are."""

    key: str
    image: Span


@dataclass(frozen=True)
class EvaluationDataset:
    """The images of a dataset, in tar order."""

    name: str
    folder: Path
    samples: tuple[ImageSample, ...]

    @cached_property
    def data_digest(self) -> str:
        """The sha256 over the dataset's tars: path, size and sha256 of each."""
        return digest_files(_tars(self.folder), self.folder)


@dataclass(frozen=True)
class ClassificationDataset(EvaluationDataset):
    """Images with one label each. Class names may repeat; a label is a line number."""

    labels_n: IntArray
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    task: Task = "zero_shot"

    @cached_property
    def prompt_digest(self) -> str:
        """The sha256 over class names and templates, in order."""
        prompts = json.dumps([self.class_names, self.templates], ensure_ascii=False)
        return hashlib.sha256(prompts.encode()).hexdigest()

    def prompts(self, class_name: str) -> list[str]:
        """Return the prompts, one a template. A class name is text, never a format string."""
        return [template.replace(PLACEHOLDER, class_name) for template in self.templates]

    def without(self, positions: Sequence[int]) -> Self:
        """Return the dataset without the samples at `positions`."""
        keep_n = _kept(len(self.samples), positions)
        samples = tuple(self.samples[i] for i in keep_n)
        return replace(self, samples=samples, labels_n=self.labels_n[keep_n])


@dataclass(frozen=True)
class RetrievalDataset(EvaluationDataset):
    """Images with one or more captions each."""

    captions: tuple[str, ...]
    image_of_caption_m: IntArray  # position of each caption's image
    task: Task = "retrieval"
    prompt_digest: None = None

    def without(self, positions: Sequence[int]) -> Self:
        """Return the dataset without the samples at `positions` and their captions."""
        keep_n = _kept(len(self.samples), positions)
        kept_m = np.flatnonzero(np.isin(self.image_of_caption_m, keep_n))
        return replace(
            self,
            samples=tuple(self.samples[i] for i in keep_n),
            captions=tuple(self.captions[i] for i in kept_m),
            image_of_caption_m=np.searchsorted(keep_n, self.image_of_caption_m[kept_m]),
        )


AnyDataset = ClassificationDataset | RetrievalDataset


def load_dataset(config: DatasetConfig) -> AnyDataset:
    """List a dataset: samples, labels or captions, prompts.

    Raises DataError where the folder is not in the layout, a sample lacks its image, label or
    caption, or the dataset is empty.
    """
    folder = config.path
    if not folder.is_dir():
        raise DataError(
            f"there is no dataset folder {folder}; expected one in the CLIP_benchmark layout "
            "(classnames.txt, test/nshards.txt, test/0.tar). Make it or mend the path in the "
            "config."
        )
    samples = [sample for tar in _tars(folder) for sample in scan_tar(tar)]
    if not samples:
        raise DataError(f"{folder} is empty: its tars in {folder / 'test'} hold no sample.")
    images = tuple(_image_sample(sample, folder) for sample in samples)
    if (config.task or _type_of(folder)) == "retrieval":
        captions, image_of_caption_m = _captions(samples, folder)
        return RetrievalDataset(config.label, folder, images, captions, image_of_caption_m)
    class_names = _lines(folder / "classnames.txt", "one class name a line, line number = label")
    templates = _lines(
        folder / "zeroshot_classification_templates.txt",
        f"one prompt a line, for example: a photo of a {PLACEHOLDER}.",
    )
    for template in templates:
        if PLACEHOLDER not in template:
            raise DataError(
                f"{folder / 'zeroshot_classification_templates.txt'}: the template {template!r} "
                "does "
                f"not say where the class name goes; expected {PLACEHOLDER} in it."
            )
    labels_n = _labels(samples, len(class_names), folder)
    return ClassificationDataset(config.label, folder, images, labels_n, class_names, templates)


def _kept(num_samples: int, positions: Sequence[int]) -> IntArray:
    return np.setdiff1d(np.arange(num_samples), np.asarray(positions, dtype=np.int64))


def _number(text: str) -> int | None:
    """Return the number that up to 9 digits are, None for anything else (int() raises on many)."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None


def _tars(folder: Path) -> list[Path]:
    count_file = folder / "test" / "nshards.txt"
    if not count_file.is_file():
        raise DataError(
            f"{count_file} is missing; expected a file with the number of tars in "
            f"{folder / 'test'} "
            "(0.tar, 1.tar, ...). Is this folder in the CLIP_benchmark layout?"
        )
    text = count_file.read_text(encoding="utf-8", errors="replace").strip()
    num_tars = _number(text)
    if num_tars is None or not 1 <= num_tars <= MAX_TARS:
        raise DataError(
            f"{count_file}: expected the number of tars, 1 to {MAX_TARS:,}, got {text[:40]!r}."
        )
    tars = [folder / "test" / f"{number}.tar" for number in range(num_tars)]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise DataError(
            f"{count_file} promises {len(tars)} tars, but {missing[0]} is missing "
            f"({len(missing)} in all). Copy the dataset again."
        )
    return tars


def _type_of(folder: Path) -> Task:
    path = folder / "dataset_type.txt"
    if not path.is_file():
        return "zero_shot"
    kind = path.read_text(encoding="utf-8", errors="replace").strip()
    if kind == "retrieval":
        return "retrieval"
    if kind in ("classification", "zeroshot_classification", "zero_shot"):
        return "zero_shot"
    raise DataError(f"{path}: expected retrieval or classification, got {kind[:40]!r}.")


def _lines(path: Path, expected: str) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"{path} is missing; expected {expected}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); expected {expected}.") from None
    # Not splitlines(): it would also cut at characters that a class name may hold.
    lines = [line.strip() for line in text.rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise DataError(f"{path}: line {number} is empty; expected {expected}.")
    return tuple(lines)


def _image_sample(sample: TarSample, folder: Path) -> ImageSample:
    images = sample.images
    if len(images) != 1:
        raise DataError(
            f"{folder}: sample {sample.key} has {len(images)} images; expected one of "
            f".{', .'.join(IMAGE_EXTENSIONS)} (its members: {', '.join(sample.members)})."
        )
    return ImageSample(sample.key, images[0])


def _labels(samples: Sequence[TarSample], num_classes: int, folder: Path) -> IntArray:
    labels_n = np.empty(len(samples), dtype=np.int64)
    for position, sample in enumerate(samples):
        text = sample.text("cls")
        if text is None:
            raise DataError(
                f"{folder}: sample {sample.key} has no .cls (its label). If this is a retrieval "
                "dataset, "
                "write `retrieval` into dataset_type.txt or set `task: retrieval`."
            )
        digits = text.strip()
        label = _number(digits)
        if label is None or label >= num_classes:
            raise DataError(
                f"{folder}: sample {sample.key} has the label {digits[:40]!r}; expected a number "
                "from 0 to "
                f"{num_classes - 1} (classnames.txt has {num_classes} lines)."
            )
        labels_n[position] = label
    return labels_n


def _captions(samples: Sequence[TarSample], folder: Path) -> tuple[tuple[str, ...], IntArray]:
    captions: list[str] = []
    image_of_caption: list[int] = []
    for position, sample in enumerate(samples):
        lines = (sample.text("txt") or "").split("\n")
        own = [line.strip() for line in lines if line.strip()]
        if not own:
            raise DataError(
                f"{folder}: sample {sample.key} has no caption; expected {sample.key}.txt with one "
                "caption "
                "a line."
            )
        captions += own
        image_of_caption += [position] * len(own)
    return tuple(captions), np.asarray(image_of_caption, dtype=np.int64)
