"""Find and read what the page is about: curated datasets and results (docs/formats.md).

runs.py reads runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from configs.errors import DataError, UsageError
from evaluation.details import read_details
from evaluation.predictions import Prediction, read_predictions
from evaluation.result import RESULTS_FILE, Result, read_results

DATASET_FILE, RUN_FILE, EXAMPLES_FILE = "report.json", "metrics.jsonl", "examples.json"


class _Read(BaseModel):
    """What is read of a file; its other fields are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class FunnelStep(_Read):
    """What is left after a rule."""

    rule: str
    remaining: int
    dropped: dict[str, int]


class Words(_Read):
    """The words of captions: totals and the curve of (rank, count)."""

    num_words: int
    num_distinct: int
    top: list[tuple[str, int]]
    curve: list[tuple[int, int]]


class BeforeAfter(_Read):
    """The same words before and after curation."""

    before: Words
    after: Words


class MatchedEntries(_Read):
    """How often the balancer's entries were matched."""

    num_matched: int
    curve: list[tuple[int, int]]
    num_matches: int
    head_share: float
    tail_share: float
    top_percent_share: float
    gini: float


class HistogramRow(_Read):
    """Entries by how many samples have them."""

    lower: int = Field(alias="from")
    entries_before: int
    entries_after: int
    matches_before: int
    matches_after: int


class Entries(_Read):
    """What the balancer did to its entries; `top` has (entry, before, after)."""

    balancer: dict[str, Any]
    num_entries: int
    num_head: int
    histogram: list[HistogramRow]
    top: list[tuple[str, int, int]]
    before: MatchedEntries
    after: MatchedEntries


class SourceTotals(_Read):
    """What became of the samples of one source; `dropped` by rule."""

    num_read: int
    num_kept: int
    num_unreadable: int
    dropped: dict[str, int]
    weight: float | None = None
    cap: int | None = None


class Histogram(_Read):
    """Counts a bin: edges[i] <= value < edges[i + 1]."""

    edges: list[int | float]
    before: list[int]
    after: list[int]


class SampleReference(_Read):
    """Where one sample's picture lies: bytes of a member of its source tar."""

    shard: str
    key: str
    caption: str | None = None
    image_offset: int | None = None
    image_size: int | None = None
    width: int | None = None
    height: int | None = None


class BestSample(SampleReference):
    """A sample that others go for; `outcome` is "kept" or why it is out itself."""

    outcome: str


class DuplicateGroup(_Read):
    """Samples that go for one other."""

    best: BestSample
    num_dropped: int
    dropped: list[SampleReference]


class OutlyingSample(SampleReference):
    """A sample at the far end of what a rule measured."""

    value: float
    outcome: str


class FarEnd(_Read):
    """The samples of the highest or lowest values of one rule."""

    end: Literal["highest", "lowest"]
    samples: list[OutlyingSample]


class Duplicates(_Read):
    """What one de-duplication dropped."""

    num_dropped: int
    groups: list[DuplicateGroup]


class FloatHistogram(_Read):
    """Counts a bin: edges[i] <= value < edges[i + 1]; what is beyond is in the last or first."""

    edges: list[float]
    before: list[int]
    after: list[int]


class ScoredSample(BestSample):
    """A sample with the value that a rule judged it by."""

    value: float


class RuleScores(_Read):
    """How the values lie that a rule judged by."""

    column: str
    num_scored: int
    num_left: int
    left: tuple[float, float] | None  # least and largest value that the rule left
    dropped: tuple[float, float] | None  # and that it dropped
    histogram: FloatHistogram
    lowest: list[ScoredSample]
    highest: list[ScoredSample]


class FrequentCaption(_Read):
    """A caption of several samples, and what became of those: "kept" or reason -> samples."""

    caption: str
    count: int
    outcomes: dict[str, int]


class Languages(_Read):
    """The languages of the sampled captions: code -> captions."""

    min_confidence: float
    before: dict[str, int]
    after: dict[str, int]


class TroubledShard(_Read):
    """A shard that could not be read whole."""

    shard: str
    why: str


class ShardTotals(_Read):
    """What was read, in shards."""

    num_read: int
    num_bytes: int
    damaged: list[TroubledShard]
    quarantined: list[TroubledShard]


class CurationReport(_Read):
    """`report.json` of a dataset folder."""

    name: str
    seed: int
    config_digest: str
    created_by: str
    num_read: int
    num_kept: int
    num_dropped: int
    num_unreadable: int
    dropped: dict[str, int]
    unreadable: dict[str, int]
    funnel: list[FunnelStep]
    sources: dict[str, SourceTotals]
    words: BeforeAfter
    entries: Entries | None
    histograms: dict[str, Histogram]
    samples: dict[str, list[SampleReference]]
    duplicates: dict[str, Duplicates] = {}
    outliers: dict[str, FarEnd] = {}
    captions: dict[str, list[FrequentCaption]] = {}
    scores: dict[str, RuleScores] = {}
    solutions: dict[str, dict[str, Any]] = {}
    languages: Languages | None = None
    caption_sample: list[tuple[str, str, str]] = []  # caption, outcome, language
    shards: ShardTotals


class ShownImage(_Read):
    """A small picture in an examples file: `png` is base64."""

    key: str
    png: str


class FoundImage(ShownImage):
    """A picture that a text found."""

    score: float
    right: bool


class FoundText(_Read):
    """A text that a picture found."""

    text: str
    score: float
    right: bool


class TextQuery(_Read):
    """A text and its nearest pictures."""

    text: str
    images: list[FoundImage]


class ImageQuery(_Read):
    """A picture and its nearest texts."""

    image: ShownImage
    own_texts: list[str]
    texts: list[FoundText]


class Examples(_Read):
    """The examples of one checkpoint on one dataset."""

    checkpoint: str
    dataset: str
    task: str
    text_to_image: list[TextQuery]
    image_to_text: list[ImageQuery]


@dataclass(frozen=True)
class Dataset:
    """A curated dataset."""

    folder: Path
    report: CurationReport
    config: str | None


@dataclass(frozen=True)
class Scorecard:
    """Results and their examples."""

    results: Sequence[Result]
    examples: Sequence[Examples]
    details: Sequence[dict[str, Any]] = ()
    predictions: Sequence[Prediction] = ()


Model = TypeVar("Model")


def find(folders: Iterable[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the folders of datasets, runs and results among `folders` and their direct children.

    Raises UsageError where a folder is not there, or none of them holds anything to report on.
    """
    folders = list(folders)
    found: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder. Give a dataset, a run, or their parent.")
        children = sorted(child for child in folder.iterdir() if child.is_dir())
        for place in [folder, *children]:
            for name, places in zip((DATASET_FILE, RUN_FILE, RESULTS_FILE), found, strict=True):
                if (place / name).is_file() and place not in places:
                    places.append(place)
    if not any(found):
        raise UsageError(
            f"there is nothing to report on in {', '.join(map(str, folders))}: expected "
            f"{DATASET_FILE} (a curated dataset), {RUN_FILE} (a run) or {RESULTS_FILE} (results) "
            "there, or in a folder directly below."
        )
    return found


def read_dataset(folder: Path) -> Dataset:
    """Read the curation report of a dataset folder."""
    report = _validated(folder / DATASET_FILE, TypeAdapter(CurationReport), "curation report")
    return Dataset(folder, report, text_of(folder / "config.yaml"))


def read_scorecard(folders: Iterable[Path]) -> Scorecard:
    """Read the results of all folders, and their examples where there are any."""
    results: list[Result] = []
    examples: list[Examples] = []
    details: list[dict[str, Any]] = []
    predictions: list[Prediction] = []
    for folder in folders:
        results += read_results(folder / RESULTS_FILE)
        details += read_details(folder)
        predictions += read_predictions(folder)
        path = folder / EXAMPLES_FILE
        if path.is_file():
            examples += _validated(path, TypeAdapter(list[Examples]), "list of retrieval examples")
    examples.sort(key=lambda e: e.task != "retrieval")  # stable: the plainest examples first
    return Scorecard(results, examples, details, predictions)


def text_of(path: Path) -> str | None:
    """Return the text of a file, None where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _validated(path: Path, adapter: TypeAdapter[Model], what: str) -> Model:
    try:
        return adapter.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise DataError(
            f"{path} is not a {what} of this version: {where}: {problem['msg']}. Make it again "
            "with this pairmill, or leave its folder out."
        ) from None
