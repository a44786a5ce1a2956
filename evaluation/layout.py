"""The folder layout of CLIP_benchmark and DataComp (docs/formats.md).

    classnames.txt  zeroshot_classification_templates.txt  [dataset_type.txt]
    test/nshards.txt  test/0.tar  test/1.tar ...      [train/...  val/...]

The order of samples is the order in the tars, tar after tar: results never depend on how images are
read. Nothing is decoded here; see images.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.errors import DataError
from evaluation.dataset import (
    PLACEHOLDER,
    EvaluationDataset,
    ImageSample,
    IntArray,
    Part,
    Prompts,
)
from evaluation.record import Record, groups_of
from evaluation.tar import IMAGE_EXTENSIONS, TarSample, digest_files, scan_tar
from evaluation.task import Task

MAX_TARS = 100_000
_MAX_DIGITS = 9


def load_folder(
    folder: Path, name: str, task: Task | None, groups: Mapping[str, str] | None = None
) -> EvaluationDataset:
    """List a dataset's test split; train and val are listed when a method asks for them.

    `groups` says where an attribute of an image stands, such as `npy:0` (record.py).

    Raises DataError where the folder is not in the layout, a sample lacks its image, label or
    caption, or the dataset is empty.
    """
    task = task or _type_of(folder)
    class_names: tuple[str, ...] = ()
    prompts = None
    if task == "zero_shot":
        class_names = lines(folder / "classnames.txt", "one class name a line, line number = label")
        prompts = Prompts(class_names, templates=read_templates(folder / TEMPLATES_FILE))

    def part(split: str) -> Part:
        return _part(folder, split, task, len(class_names), groups or {})

    splits = [split for split in ("train", "val") if (folder / split / "nshards.txt").is_file()]
    return EvaluationDataset(
        name,
        task,
        class_names,
        prompts,
        dict.fromkeys(("test", *splits), part),
        {"test": part("test")},
    )


TEMPLATES_FILE = "zeroshot_classification_templates.txt"


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the templates of a file, one a line; each must say where the class name goes."""
    templates = lines(path, f"one prompt a line, for example: a photo of a {PLACEHOLDER}.")
    check_templates(templates, str(path))
    return templates


def check_templates(templates: Sequence[str], where: str) -> None:
    """Raise DataError where a template does not say where the class name goes."""
    for template in templates:
        if PLACEHOLDER not in template:
            raise DataError(
                f"{where}: the template {template!r} does not say where the class name goes; "
                f"expected {PLACEHOLDER} in it."
            )


def _part(
    folder: Path, split: str, task: Task, num_classes: int, groups: Mapping[str, str]
) -> Part:
    tars = _tars(folder, split)
    samples = [sample for tar in tars for sample in scan_tar(tar)]
    if not samples:
        raise DataError(f"{folder} is empty: its tars in {folder / split} hold no sample.")
    images = tuple(_image_sample(sample, folder) for sample in samples)

    def digest() -> str:
        return digest_files(tars, folder)

    if task == "retrieval":
        captions, image_of_caption_m = _captions(samples, folder)
        return Part(images, digest, captions=captions, image_of_caption_m=image_of_caption_m)
    records = [Record(s.key, s.images[0], s, {}) for s in samples] if groups else []
    found = {name: groups_of(records, reference) for name, reference in groups.items()}
    labels_n = _labels(samples, num_classes, folder)
    return Part(images, digest, labels_n=labels_n, groups=found)


def number(text: str) -> int | None:
    """Return the number that up to 9 digits are, None for anything else (int() raises on many)."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None


def _tars(folder: Path, split: str) -> list[Path]:
    count_file = folder / split / "nshards.txt"
    if not count_file.is_file():
        raise DataError(
            f"{count_file} is missing; expected a file with the number of tars in "
            f"{folder / split} "
            "(0.tar, 1.tar, ...). Is this folder in the CLIP_benchmark layout?"
        )
    text = count_file.read_text(encoding="utf-8", errors="replace").strip()
    num_tars = number(text)
    if num_tars is None or not 1 <= num_tars <= MAX_TARS:
        raise DataError(
            f"{count_file}: expected the number of tars, 1 to {MAX_TARS:,}, got {text[:40]!r}."
        )
    tars = [folder / split / f"{place}.tar" for place in range(num_tars)]
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


def lines(path: Path, expected: str) -> tuple[str, ...]:
    """Return the lines of a text file, none of which may be empty."""
    if not path.is_file():
        raise DataError(f"{path} is missing; expected {expected}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); expected {expected}.") from None
    # Not splitlines(): it would also cut at characters that a class name may hold.
    found = [line.strip() for line in text.rstrip().split("\n")]
    for place, line in enumerate(found, start=1):
        if not line:
            raise DataError(f"{path}: line {place} is empty; expected {expected}.")
    return tuple(found)


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
        label = number(digits)
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
