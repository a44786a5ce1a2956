"""Result rows, the file that holds them, and the table that a person reads.

The fields are those of docs/formats.md, Results.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from configs.errors import DataError
from configs.publish import publish_text
from configs.registry import Config

RESULTS_FILE = "results.jsonl"
BASELINE = "pixel-1nn"  # the rows' `checkpoint` of the pixel nearest-neighbour baseline


class Result(Config):
    """One metric of one checkpoint on one dataset. Fractions are in [0, 1]."""

    checkpoint: str
    checkpoint_digest: str
    samples_seen: int | None
    dataset: str
    method: str
    shots: int | None = None
    metric: str
    value: float
    interval: tuple[float, float] | None
    chance: float | None
    n: int
    seed: int
    seeds: tuple[int, ...] = ()
    chosen: dict[str, Any] = Field(default_factory=dict)
    compat: str = "none"
    metric_definition: str
    prompt_digest: str | None
    data_digest: str
    config_digest: str
    job_digest: str = ""
    version: str
    seconds: float

    @property
    def metric_id(self) -> str:
        """What was measured, down to its definition: METHOD/METRIC#8 hexadecimal digits."""
        digest = hashlib.sha256(self.metric_definition.encode()).hexdigest()[:8]
        return f"{self.method}/{self.metric}#{digest}"

    @property
    def job(self) -> tuple[str, str, str, str]:
        """What was computed in one go, and is replaced together."""
        return self.dataset, self.method, self.checkpoint, self.compat

    @property
    def order(self) -> tuple[str, str, str, str, int]:
        """The key by which rows are sorted; metrics stay in the order of their method."""
        return (*self.job, self.shots or 0)


def software_version() -> str:
    """Return the version of pairmill; "source" where it runs without being installed."""
    try:
        return importlib.metadata.version("pairmill")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def read_results(path: Path) -> list[Result]:
    """Read a results file. Raises DataError where a line is not a result."""
    try:
        # Not splitlines(): it would also cut at characters that a name may hold.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a results file: {error}") from None
    results: list[Result] = []
    if lines == [""]:
        return results
    for number, line in enumerate(lines, start=1):
        try:
            results.append(Result.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise DataError(
                f"{path}, line {number} is not a result: {where or 'line'}: {problem['msg']}. "
                "Move the file away, or choose another `output`."
            ) from None
    return results


def read_published(folder: Path) -> list[Result]:
    """Return the rows that stand in a folder; none where nothing was published yet."""
    path = folder / RESULTS_FILE
    return read_results(path) if path.exists() else []


def merge(old: Iterable[Result], new: Sequence[Result]) -> list[Result]:
    """Return both, sorted; new rows replace the old of their checkpoint, dataset and method."""
    replaced = {row.job for row in new}
    kept = [row for row in old if row.job not in replaced]
    return sorted([*kept, *new], key=lambda row: row.order)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from merging into the folder's files: tasks of an array share it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def publish_results(folder: Path, new: Sequence[Result]) -> Path:
    """Merge the rows into the folder's results.jsonl; rows of other checkpoints stay.

    Call it within `locked`.
    """
    path = folder / RESULTS_FILE
    rows = merge(read_published(folder), new)
    publish_text(path, "".join(row.model_dump_json() + "\n" for row in rows))
    return path


def table(results: Sequence[Result]) -> str:
    """Return the rows as a table for people, the baseline's value beside each checkpoint's."""
    beside = {
        (row.dataset, row.method, row.metric): row.value
        for row in results
        if row.checkpoint == BASELINE
    }
    header = ("dataset", "method", "metric", "value", "95 % interval", "chance", "baseline", "n")
    tables = []
    for checkpoint in sorted({row.checkpoint for row in results} - {BASELINE}) or [BASELINE]:
        lines = [header]
        for row in sorted(results, key=lambda row: row.order):
            if row.checkpoint != checkpoint:
                continue
            pixel = beside.get((row.dataset, row.method, row.metric))
            low_high = "-"
            if row.interval is not None:
                low_high = f"{written(row, row.interval[0])} - {written(row, row.interval[1])}"
            lines.append(
                (
                    row.dataset,
                    method_label(row),
                    row.metric,
                    written(row, row.value),
                    low_high,
                    "-" if row.chance is None else written(row, row.chance),
                    "-" if pixel is None else written(row, pixel),
                    f"{row.n:,}",
                )
            )
        tables.append(f"{checkpoint}\n{_aligned(lines)}")
    return "\n\n".join(tables)


def method_label(row: Result) -> str:
    """Return the method with its shots, marked where the authors' protocol looked at test data."""
    shots = f" {row.shots}-shot" if row.shots is not None else ""
    return f"{row.method}{shots}{' (published protocol)' if row.compat == 'published' else ''}"


# Metrics that are no fraction: written as plain numbers.
_PLAIN = ("nll", "brier", "clip_score", "ref_clip_score", "mano_score", "alignment", "modality_gap")
_PLAIN_STEMS = ("uniformity", "effective_rank", "cone", "nll", "brier")


def is_fraction(metric: str) -> bool:
    """Whether a metric is a share, and so is written in per cent."""
    return metric not in _PLAIN and not metric.startswith(_PLAIN_STEMS)


def written(row: Result, number: float) -> str:
    """Write a number of a row: a fraction as per cent, with enough digits to tell it from zero."""
    if not is_fraction(row.metric):
        return f"{number:.4g}"
    percent = 100 * number
    return f"{percent:.3f} %" if 0 < percent < 1 else f"{percent:.1f} %"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    num_left = 3  # names to the left, numbers to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
