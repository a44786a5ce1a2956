"""A dataset as a YAML file: where images, labels, captions, groups and prompts are.

    task: zero_shot                       # retrieval, selection, association
    images: [train.tar]                   # tars (also *.tar), or tables (.jsonl, .csv) with `image`
    labels: cls                           # a value: see below; or several, the first that is there
    other_labels: error                   # leave_out: images whose label is none of the classes
    classes: classes.json                 # a list here, a JSON list, or a file with one a line
    captions: [txt, json:description]     # several values, or values that are lists
    groups: {region: json:region}
    prompts: {templates: [a picture of {c}]}     # or per_class: {class: [prompt, ...]}
    split: {by: json:title, val: 0.2, test: 0.3} # the rest is train

A value is `EXT` (a text member, or a table's column), `json:FIELD` (of the .json member; dots go
deeper) or `npy:INDEX` (of the .npy member). Paths are relative to the file. `splits` gives each
split its own images instead. `split.by` keeps equal values (near duplicates) in one split.

A selection dataset has one caption an image; an instance is the images of one value of `instances`
(default: each image by itself) with their captions and their `distractors`.

An association dataset has a row for each image of an instance: `captions` gives the instance's cue,
`labels` 1 where the image belongs to it, else 0.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from configs import draws
from configs.errors import DataError
from configs.load import validate
from configs.registry import Config
from evaluation import remote
from evaluation.dataset import EvaluationDataset, ImageSample, IntArray, Part, Prompts
from evaluation.layout import check_templates, lines, number, read_templates
from evaluation.record import Record, groups_of
from evaluation.tar import Span, file_sha256, scan_tar
from evaluation.task import Sha256, Task

_PURPOSE = "evaluation/split"
_MAX_TABLE_BYTES = 1 << 30
SPLITS = ("train", "val", "test")
_OF_INSTANCES = ("selection", "association")
Share = Annotated[float, Field(ge=0, le=1)]


class PromptsConfig(Config):
    """Templates for all classes (a list, or a file), or each class's own prompts (or a file)."""

    templates: tuple[str, ...] | str | None = None
    per_class: dict[str, tuple[str, ...]] | str | None = None
    key: str | None = None  # the entry of a JSON file that holds several datasets

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.templates is None) == (self.per_class is None):
            raise ValueError("expected either `templates` or `per_class`")
        return self


class SplitConfig(Config):
    """How one pool is cut: by hash of a value (or the key), the same for equal values."""

    by: str | None = None
    seed: int = 0
    val: Share = 0.0
    test: Share = 1.0


class DescriptionConfig(Config):
    """The YAML file."""

    name: str | None = None
    task: Task = "zero_shot"
    images: tuple[str, ...] = ()
    splits: dict[Literal["train", "val", "test"], tuple[str, ...]] = Field(default_factory=dict)
    split: SplitConfig | None = None
    labels: str | tuple[str, ...] | None = None
    other_labels: Literal["error", "leave_out"] = "error"
    classes: tuple[str, ...] | str | None = None
    classes_key: str | None = None
    captions: tuple[str, ...] = ()
    distractors: tuple[str, ...] = ()
    instances: str | None = None
    groups: dict[str, str] = Field(default_factory=dict)
    prompts: PromptsConfig | None = None
    checksums: dict[str, Sha256] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_what_its_task_needs(self) -> Self:
        if bool(self.images) == bool(self.splits):
            raise ValueError("expected either `images` or `splits`")
        if self.splits and ("test" not in self.splits or self.split is not None):
            raise ValueError("`splits` needs a test split, and no `split`")
        if self.task == "zero_shot" and None in (self.labels, self.classes, self.prompts):
            raise ValueError("zero_shot needs `labels`, `classes` and `prompts`")
        if self.task != "zero_shot" and not self.captions:
            raise ValueError(f"{self.task} needs `captions`")
        if self.task == "association" and None in (self.labels, self.instances):
            raise ValueError("association needs `labels` (1 and 0) and `instances`")
        return self


def load_description(path: Path, name: str, cache: Path, task: Task | None) -> EvaluationDataset:
    """Read a YAML description; its splits are listed when a method asks for them."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {error}") from None
    config = validate(tree or {}, DescriptionConfig, label=str(path))
    if task is not None:
        config = validate({**(tree or {}), "task": task}, DescriptionConfig, label=str(path))
    remote.verify(path.parent, config.checksums)
    reader = _Reader(path, config, cache)
    classes = reader.classes()
    # a file may hold both prompts and captions: the task says which are the texts
    prompts = reader.prompts(classes) if config.task == "zero_shot" else None
    splits = tuple(config.splits) or SPLITS
    if not config.splits and config.split is None:
        splits = ("test",)
    sources: dict[str, Callable[[str], Part]] = dict.fromkeys(splits, reader.part)
    return EvaluationDataset(
        name, config.task, classes, prompts, sources, {"test": reader.part("test")}
    )


class _Reader:
    def __init__(self, path: Path, config: DescriptionConfig, cache: Path) -> None:
        self.path = path
        self.config = config
        self.cache = cache
        self._pool: list[Record] | None = None

    def _file(self, name: str) -> Path:
        if remote.is_remote(name):
            return remote.fetch_file(name, self.cache)
        return self.path.parent / name

    def _files(self, names: Sequence[str]) -> list[Path]:
        return [path for name in names for path in matching(self.path, name) or [self._file(name)]]

    def classes(self) -> tuple[str, ...]:
        config = self.config
        if config.classes is None or not isinstance(config.classes, str):
            return config.classes or ()
        path = self._file(config.classes)
        if path.suffix != ".json":
            return lines(path, "one class name a line, line number = label")
        return tuple(_json_entry(path, config.classes_key, list))

    def prompts(self, classes: tuple[str, ...]) -> Prompts | None:
        config = self.config.prompts
        if config is None:
            return None
        where = f"{self.path}: prompts"
        if config.templates is not None:
            templates = config.templates
            if isinstance(templates, str):
                path = self._file(templates)
                templates = (
                    tuple(_json_entry(path, config.key, list))
                    if path.suffix == ".json"
                    else read_templates(path)
                )
            templates = tuple(t if "{c}" in t else t.replace("{}", "{c}") for t in templates)
            check_templates(templates, where)
            return Prompts(classes, templates=templates)
        per_class = config.per_class
        if isinstance(per_class, str):
            per_class = _json_entry(self._file(per_class), config.key, dict)
        assert per_class is not None
        missing = [name for name in classes if not per_class.get(name)]
        if missing:
            raise DataError(f"{where}: no prompt for the classes {', '.join(missing[:5])}.")
        return Prompts(classes, per_class=tuple(tuple(per_class[name]) for name in classes))

    def part(self, split: str) -> Part:
        if self.config.splits:
            records = list(self._records(self.config.splits[split]))  # type: ignore[index]
            files = self.config.splits[split]  # type: ignore[index]
        else:
            if self._pool is None:
                self._pool = list(self._records(self.config.images))
            names = self._assigned(self._pool)
            records = [r for r, name in zip(self._pool, names, strict=True) if name == split]
            files = self.config.images
        if self.config.other_labels == "leave_out":
            records = self._of_classes(split, records)
        if not records:
            raise DataError(f"{self.path}: the {split} split holds no image.")
        return self._part(split, records, self._files(files))

    def _records(self, names: Sequence[str]) -> Iterator[Record]:
        for path in self._files(names):
            if not path.is_file():
                raise DataError(f"{self.path}: there is no file {path}; expected a tar or a table.")
            if path.suffix == ".tar":
                for sample in scan_tar(path):
                    if len(sample.images) != 1:
                        raise DataError(
                            f"{path}: sample {sample.key} has {len(sample.images)} images; "
                            "expected one."
                        )
                    yield Record(sample.key, sample.images[0], sample, {})
            else:
                yield from _table(path)

    def _of_classes(self, split: str, records: Sequence[Record]) -> list[Record]:
        """Return the records whose label is one of the classes; say how many are left out."""
        label_of = self._label_of()
        kept = [record for record in records if label_of(record)[0] is not None]
        if len(kept) < len(records):
            print(
                f"{self.path}: {split}: {len(records) - len(kept):,} of {len(records):,} images "
                "have a label that is none of the classes; left out",
                file=sys.stderr,
            )
        return kept

    def _assigned(self, pool: Sequence[Record]) -> list[str]:
        split = self.config.split
        if split is None:
            return ["test"] * len(pool)
        values = [str(r.value(split.by)) if split.by else r.key for r in pool]
        words = [
            int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
            for value in values
        ]
        draw = draws.uniform(split.seed, _PURPOSE, np.asarray(words, dtype=np.uint64))
        return [
            "test" if d < split.test else "val" if d < split.test + split.val else "train"
            for d in draw.tolist()
        ]

    def _part(self, split: str, records: Sequence[Record], files: Sequence[Path]) -> Part:
        config = self.config
        labels_n = self._labels(records) if config.labels is not None else None
        captions: list[str] = []
        owner: list[int] = []
        for position, record in enumerate(records):
            own = record.texts(config.captions)
            if config.task != "zero_shot" and not own:
                raise DataError(f"{self.path}: {record.key} has no caption.")
            own = own[:1] if config.task in _OF_INSTANCES else own
            captions += own
            owner += [position] * len(own)
        samples = tuple(ImageSample(r.key, r.image) for r in records)
        groups = {name: groups_of(records, ref) for name, ref in config.groups.items()}
        distractors = tuple(tuple(r.texts(config.distractors)) for r in records)
        instances = (
            tuple(str(r.value(config.instances)) for r in records)
            if config.instances
            else tuple(r.key for r in records)
        )
        part = Part(
            samples,
            lambda: "",
            labels_n,
            tuple(captions),
            np.asarray(owner, dtype=np.int64),
            groups,
            distractors if config.task == "selection" else (),
            instances if config.task in _OF_INSTANCES else (),
        )
        return replace(
            part,
            digest_of=lambda: _digest(split, part, records, files),
            images_digest_of=lambda: _images_digest(records, files),
        )

    def _label_of(self) -> Callable[[Record], tuple[int | None, str]]:
        """Return a function from a record to its label, None where it is no class, and the text."""
        classes = ("0", "1") if self.config.task == "association" else self.classes()
        position = {name: label for label, name in reversed(list(enumerate(classes)))}
        given = self.config.labels or "cls"
        references = (given,) if isinstance(given, str) else given

        def label_of(record: Record) -> tuple[int | None, str]:
            values = (record.value(reference) for reference in references)
            text = str(next((value for value in values if value is not None), None)).strip()
            label = number(text)
            label = position.get(text) if label is None else label
            return (None if label is None or label >= len(classes) else label), text

        return label_of

    def _labels(self, records: Sequence[Record]) -> IntArray:
        label_of = self._label_of()
        labels_n = np.empty(len(records), dtype=np.int64)
        for i, record in enumerate(records):
            label, text = label_of(record)
            if label is None:
                raise DataError(
                    f"{self.path}: {record.key} has the label {text[:40]!r}; expected a class name "
                    "or its number (or other_labels: leave_out)."
                )
            labels_n[i] = label
        return labels_n


def matching(description: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern with a `*` beside a description; none where it has no star."""
    if "*" not in pattern or remote.is_remote(pattern):
        return []
    return sorted(Path(found) for found in glob.glob(str(description.parent / pattern)))


def images_are_there(description: Path) -> bool:
    """Whether the local files of a description's images are there; it is not read further."""
    try:
        tree = yaml.safe_load(description.read_text(encoding="utf-8"))
        names = [
            *tree.get("images", ()),
            *(n for own in tree.get("splits", {}).values() for n in own),
        ]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError):
        return True  # loading it will say what is wrong
    return all(
        remote.is_remote(name)
        or matching(description, name)
        or (description.parent / name).exists()
        for name in map(str, names)
    )


def _digest(split: str, part: Part, records: Sequence[Record], files: Sequence[Path]) -> str:
    """The sha256 over the files and what was read out of them."""
    images = sorted({r.image.tar for r in records} - set(files))
    content = [
        split,
        [[path.name, file_sha256(path)] for path in [*files, *images]],
        [r.key for r in records],
        None if part.labels_n is None else part.labels_n.tolist(),
        part.captions,
        part.distractors,
        part.instances,
        {n: [g.names, g.index_n.tolist()] for n, g in part.groups.items()},
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _images_digest(records: Sequence[Record], files: Sequence[Path]) -> str:
    """The sha256 over the bytes of the images' files, and where in them each image is."""
    sources = sorted({record.image.tar for record in records} | set(files))
    places = {path: number for number, path in enumerate(sources)}
    content = [
        [file_sha256(path) for path in sources],
        [[places[r.image.tar], r.image.offset, r.image.num_bytes] for r in records],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _json_entry(path: Path, key: str | None, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from None
    if key is not None and isinstance(content, dict):
        content = content.get(key)
    if not isinstance(content, kind):
        raise DataError(f"{path}{f', {key}' if key else ''}: expected a JSON {kind.__name__}.")
    return content


def _table(path: Path) -> Iterator[Record]:
    """Yield the rows of a JSON-lines or CSV table; `image` is a path relative to it."""
    if path.stat().st_size > _MAX_TABLE_BYTES:
        raise DataError(f"{path} is larger than {_MAX_TABLE_BYTES >> 20} MiB; use tars.")
    text = path.read_text(encoding="utf-8")
    try:
        rows = (
            list(csv.DictReader(io.StringIO(text)))
            if path.suffix == ".csv"
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
        names = [str(row["image"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected rows with a column `image`, got {error!r}.") from None
    for name, row in zip(names, rows, strict=True):
        image = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not image.is_file():
            raise DataError(f"{path}: there is no image {name!r} below its folder.")
        yield Record(name, Span(image, 0, image.stat().st_size), None, row)
