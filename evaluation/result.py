"""Result rows, the file that holds them, and the table that a person reads.

The fields are those of docs/formats.md, Results.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

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
    task: str
    metric: str
    value: float
    interval: tuple[float, float]
    chance: float
    n: int
    seed: int
    metric_definition: str
    prompt_digest: str | None
    data_digest: str
    config_digest: str
    version: str
    seconds: float

    @property
    def order(self) -> tuple[str, str, str]:
        """The key by which rows are sorted; metrics stay in the order of their method."""
        return self.dataset, self.task, self.checkpoint


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
    """Return both, sorted; new rows replace the old of their checkpoint, dataset and task."""
    replaced = {row.order for row in new}
    kept = [row for row in old if row.order not in replaced]
    return sorted([*kept, *new], key=lambda row: row.order)


def publish_results(folder: Path, new: Sequence[Result]) -> Path:
    """Merge the rows into the folder's results.jsonl; rows of other checkpoints stay."""
    path = folder / RESULTS_FILE
    rows = merge(read_published(folder), new)
    publish_text(path, "".join(row.model_dump_json() + "\n" for row in rows))
    return path


def table(results: Sequence[Result]) -> str:
    """Return the rows as a table for people, the baseline's value beside each checkpoint's."""
    beside = {
        (row.dataset, row.task, row.metric): row.value
        for row in results
        if row.checkpoint == BASELINE
    }
    header = ("dataset", "metric", "value %", "95 % interval", "chance %", "baseline %", "n")
    tables = []
    for checkpoint in sorted({row.checkpoint for row in results} - {BASELINE}) or [BASELINE]:
        lines = [header]
        for row in sorted(results, key=lambda row: row.order):
            if row.checkpoint != checkpoint:
                continue
            pixel = beside.get((row.dataset, row.task, row.metric))
            lines.append(
                (
                    row.dataset,
                    row.metric,
                    _percent(row.value),
                    f"{_percent(row.interval[0])} - {_percent(row.interval[1])}",
                    _percent(row.chance),
                    "-" if pixel is None else _percent(pixel),
                    f"{row.n:,}",
                )
            )
        tables.append(f"{checkpoint}\n{_aligned(lines)}")
    return "\n\n".join(tables)


def _percent(fraction: float) -> str:
    """Write a fraction as per cent with enough digits to tell a small chance level from zero."""
    percent = 100 * fraction
    return f"{percent:.3f}" if 0 < percent < 1 else f"{percent:.1f}"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    num_left = 2  # names to the left, numbers to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
